"""The tasks by definition, in plain Python.

Each takes the names of the tokens of a document and gives, by place, the name of the target of each token that has one.
"""

from mamba3_jax.data.synthetic import TASKS


def parity_by_hand(names):
    """XOR with Python's own operator."""
    state, wanted = 0, {}
    for place, name in enumerate(names):
        state ^= int(name)
        wanted[place] = str(state)
    return wanted


def word_by_hand(names):
    """Objects moved about: after "21345" what stood first stands second."""
    standing, wanted = list(range(1, 1 + len(names[0]))), {}
    for place, name in enumerate(names):
        moved = list(standing)
        for here, there in enumerate(name):
            moved[int(there) - 1] = standing[here]
        standing = moved
        wanted[place] = "".join(str(1 + standing.index(thing)) for thing in sorted(standing))
    return wanted


def sum_by_hand(order):
    return lambda names: {place: str(sum(map(int, names[: place + 1])) % order) for place in range(len(names))}


def arithmetic_by_hand(names):
    """Python's own value of every prefix that ends in a digit."""
    equals = names.index("=")
    wanted = {place: str(eval("".join(names[: place + 1])) % 5) for place in range(0, equals, 2)}
    return wanted | {equals: wanted[equals - 1]}


def left_to_right(names):
    """Arithmetic without precedence, which is wrong."""
    value, wanted = names[0], {0: names[0]}
    for place in range(2, names.index("="), 2):
        value = str(eval(value + names[place - 1] + names[place]))
        wanted[place] = str(int(value) % 5)
    return wanted


def brackets_by_hand(names):
    equals = names.index("=")
    return {equals: str(eval("".join(names[:equals])) % 5)}


def flip_flop_by_hand(names):
    """A stack, as Python has it."""
    stack, wanted = [], {}
    for place in range(0, len(names) - len(names) % 2, 2):
        instruction, bit = names[place : place + 2]
        if instruction == "w":
            stack.append(bit)
        if instruction == "u" and len(stack) > 1:
            stack.pop()
        if instruction == "r":
            wanted[place] = stack[-1]
    return wanted


def mqar_by_hand(names):
    """A dictionary, filled by as many pairs as there is room for, so that every second place after them is a query."""
    context = 2 * (len(names) // 4)
    values = dict(zip(names[:context:2], names[1:context:2], strict=True))
    return {place: values[names[place]] for place in range(context, len(names) - 1, 2)}


def needle_by_hand(names):
    """Python's own search for the mark and the key that the question ends with."""
    question = names.index("?")
    key = names[question + 1]
    place = next(i for i in range(question) if names[i : i + 2] == ["!", key])
    return {question + 1 + i: names[place + 2 + i] for i in range(4)}


# How many of a document's last targets answer all of it, where that is not one.
ANSWER = {"needle": 4, "needle_alike": 4}

BY_HAND = {
    "parity": parity_by_hand,
    "arithmetic": arithmetic_by_hand,
    **dict.fromkeys(("arithmetic_brackets", "arithmetic_brackets_times"), brackets_by_hand),
    **dict.fromkeys(("flip_flop", "flip_flop_undo"), flip_flop_by_hand),
    **dict.fromkeys(("mqar", "mqar_blank", "mqar_64"), mqar_by_hand),
    **dict.fromkeys(("needle", "needle_alike"), needle_by_hand),
    **{name: sum_by_hand(int(name[1])) for name in TASKS if name[0] == "Z"},
    **{name: word_by_hand for name in TASKS if name[0] in "SA"},
}
