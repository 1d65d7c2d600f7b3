"""The text of an HLO module: instructions, the bytes of shapes, the devices of a group."""

import math
import re
from dataclasses import dataclass

BITS = {"pred": 8, "token": 0, "opaque": 0}  # of dtypes without a number in their name
ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
OPCODE = re.compile(r"(?:^|[ )}\]])([a-z][\w\-]*)\(")
CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
GROUPS = re.compile(r"replica_groups=(mesh\[[^{]*\{[^}]*\}|\[[^\]]*\]|\{\{[^}]*\})")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, kind: str) -> str | None:
        """Return the name of the computation that it calls as its `kind`, "body" or "calls" say; None: it has none."""
        return dict(CALLED.findall(self.attributes)).get(kind)


def parse(line: str) -> Instruction:
    """Read the instruction of a line."""
    name = INSTRUCTION.match(line).group(1)
    rest = line[line.index(" = ") + 3 :]
    end = closing(rest, 0) if rest[0] == "(" else 0  # a tuple's shape has parentheses of its own
    match = OPCODE.search(rest, end)
    last = closing(rest, match.end() - 1)
    inside = rest[match.end() : last - 1]
    operands = [re.sub(r"^.*%", "", part.strip()) for part in re.split(r",(?![^{\[]*[}\]])", inside)]
    is_root = line.lstrip().startswith("ROOT ")
    return Instruction(
        name=name,
        shape=rest[: match.start(1)].strip(),
        opcode=match.group(1),
        operands=tuple(operands),
        attributes=rest[last:],
        is_root=is_root,
    )


def closing(text: str, begin: int) -> int:
    """Return the place after the parenthesis that closes the one at `begin`."""
    depth = 0
    for place in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"unbalanced parentheses in {text[:200]!r}")


def arrays(shape: str) -> list[str]:
    """Return the shapes of the arrays that a shape is made of: those of a tuple in order."""
    return [match.group() for match in ARRAY.finditer(shape)]


def hbm_bytes(shape: str, anywhere: bool = False) -> int:
    """Return the bytes that a shape takes in HBM, with the padding of its tiles; `anywhere`: in any memory."""
    total = 0
    for dtype, sizes, layout in ARRAY.findall(shape):
        if not anywhere and re.search(r"S\(\d+\)", layout or ""):
            continue
        sizes = [int(size) for size in sizes.split(",") if size]
        order, _, tiles = (layout or "").partition(":")
        tile = re.search(r"T\(([\d,]+)\)", tiles)
        if tile and order:
            minor_first = [sizes[int(axis)] for axis in order.split(",")]
            for i, size in enumerate(reversed(tile.group(1).split(","))):
                if i < len(minor_first):
                    minor_first[i] = -(-minor_first[i] // int(size)) * int(size)
            sizes = minor_first
        bits = BITS[dtype] if dtype in BITS else int(re.search(r"\d+", dtype).group())
        total += math.prod(sizes) * bits // 8
    return total


def plain_bytes(shape: str) -> int:
    """Return the bytes of a shape's numbers, in any memory, without the padding of tiles."""
    return hbm_bytes(re.sub(r"\{[^{}]*\}", "", shape), anywhere=True)


def group_size(attributes: str) -> int:
    """Return how many devices of a collective exchange with one another; 1 where it names no groups.

    Raises:
        ValueError: the groups are written in an unknown way.
    """
    if "source_target_pairs=" in attributes or "replica_groups=" not in attributes:
        return 1
    match = GROUPS.search(attributes)
    if match is None:
        raise ValueError(f"how many devices a collective has is not in {attributes[:200]!r}")
    groups = match.group(1)
    if groups.startswith("mesh"):  # mesh['a'=2,'b'=4], ... {'b'}: the axes of a group; 'b':(1)2 is a part of one
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[groups.index("{") :])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if groups.startswith("["):  # [groups, size]<=...
        return int(groups.strip("[]").split(",")[-1])
    return groups.count(",") + 1  # the first of {{0,1},{2,3}}


def sizes_of(shape: str) -> list[int]:
    """Return the sizes of an array's axes."""
    return [int(size) for size in ARRAY.search(shape).group(2).split(",") if size]
