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


BY_HAND = {
    "parity": parity_by_hand,
    "arithmetic": arithmetic_by_hand,
    **dict.fromkeys(("arithmetic_brackets", "arithmetic_brackets_times"), brackets_by_hand),
    **dict.fromkeys(("flip_flop", "flip_flop_undo"), flip_flop_by_hand),
    **{name: sum_by_hand(int(name[1])) for name in TASKS if name[0] == "Z"},
    **{name: word_by_hand for name in TASKS if name[0] in "SA"},
}
