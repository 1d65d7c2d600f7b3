"""What a compiled TPU program moves and how long its compiler thinks it takes, read from its text.

`cost_analysis` counts the body of a loop once and does not tell HBM from VMEM. The text has both: layouts name the
memory space (`S(1)` is VMEM; none is HBM), and a loop over chunks compares its counter with a constant. So here a body
counts once a trip, an array counts only where it lies in HBM and as large as its tiles make it, an operand that a
fusion slices counts as the slice, and one that it updates in place as the update. A kernel's operands and results
count once.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
OPCODE = re.compile(r"(?:^|[ )}\]])([a-z][\w\-]*)\(")
CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# These move nothing, or what they move is counted where it begins.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all copy-done async-done async-update slice-done "  # noqa: SIM905
    "opt-barrier optimization-barrier partition-id replica-id add-dependency".split()
)
SLICES = frozenset({"dynamic-slice", "slice", "gather"})


class Cost(NamedTuple):
    hbm_bytes: int = 0
    cycles: int = 0  # the compiler's, of all but kernels and copies in flight

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        return Cost(self.hbm_bytes + times * other.hbm_bytes, self.cycles + times * other.cycles)


@dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, kind: str) -> str | None:
        return dict(CALLED.findall(self.attributes)).get(kind)


class Program:
    """The computations of an HLO module's text, each a dict of instructions in order."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current = None
        for line in text.splitlines():
            if match := COMPUTATION.match(line):
                current = self.computations[match.group(2)] = {}
                self.entry = match.group(2) if match.group(1) else self.entry
            elif current is not None and INSTRUCTION.match(line):
                instruction = parse(line)
                current[instruction.name] = instruction

    def kernels(self) -> list[str]:
        """Return the names of the calls of Pallas kernels."""
        each = (i for computation in self.computations.values() for i in computation.values())
        return [i.name for i in each if 'custom_call_target="tpu_custom_call"' in i.attributes]

    def cost(self, computation: str = "") -> Cost:
        """Of one run of a computation, the entry unless named."""
        body = self.computations[computation or self.entry]
        return functools.reduce(Cost.plus, (self._cost(i, body) for i in body.values()), Cost())

    def _cost(self, instruction: Instruction, body: dict) -> Cost:
        opcode, shape = instruction.opcode, instruction.shape
        if opcode in FREE or "AllocateBuffer" in instruction.attributes:
            return Cost()
        if opcode == "while":
            trips = self.trips(instruction.called("condition"))
            return Cost().plus(self.cost(instruction.called("body")), trips)
        if opcode == "conditional":
            branches = BRANCHES.search(instruction.attributes)
            names = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
            names = names or [instruction.called(f"{case}_computation") for case in ("true", "false")]
            return max(map(self.cost, names))
        if opcode in ("call", "async-start"):
            return self.cost(instruction.called("to_apply") or instruction.called("calls"))
        cycles = sum(map(int, CYCLES.findall(instruction.attributes)[:1]))
        operands = [body[name].shape for name in instruction.operands if name in body]
        if opcode in ("copy-start", "slice-start"):  # (target, source, semaphore): what either side has in HBM
            target, source = arrays(shape)[:2]
            moved = min(hbm_bytes(target, anywhere=True), hbm_bytes(source, anywhere=True))
            return Cost(sum(moved for side in (target, source) if hbm_bytes(side)), cycles)
        if opcode == "fusion":
            inner = instruction.called("calls")
            read = sum(self.read(inner, i) if hbm_bytes(x) else 0 for i, x in enumerate(operands))
            return Cost(read + self.written(inner, shape), cycles)
        if opcode in SLICES:
            return Cost(2 * hbm_bytes(shape) if operands and hbm_bytes(operands[0]) else hbm_bytes(shape), cycles)
        if opcode == "dynamic-update-slice":
            return Cost(2 * hbm_bytes(operands[1], anywhere=True) if hbm_bytes(shape) else 0, cycles)
        return Cost(sum(map(hbm_bytes, operands)) + hbm_bytes(shape), cycles)

    def trips(self, condition: str) -> int:
        """Of a loop that counts from 0 up to a constant.

        Raises:
            ValueError: the condition is another.
        """
        found = self.computations[condition].values()
        root = next(i for i in found if i.is_root)
        bounds = [i for i in found if i.opcode == "constant" and re.match(r"[su]32\[\]", i.shape)]
        if root.opcode == "fusion":  # the comparison within, the bound without
            root = next(i for i in self.computations[root.called("calls")].values() if i.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes or len(bounds) != 1:
            raise ValueError(f"how often a loop runs is not in its condition {condition!r}")
        return int(re.match(r"\d+", bounds[0].operands[0]).group())

    def read(self, computation: str, index: int) -> int:
        """Bytes that a fused computation reads of its parameter: all, or its slices where it only slices it."""
        body = self.computations[computation]
        source = next(i for i in body.values() if i.opcode == "parameter" and i.operands == (str(index),))
        whole, total = hbm_bytes(source.shape, anywhere=True), 0
        for user, place in users(body, source.name):
            if user.opcode in SLICES and place == 0:
                total += hbm_bytes(user.shape, anywhere=True)
            elif user.opcode == "fusion":
                total += self.read(user.called("calls"), place)
            elif user.opcode != "dynamic-update-slice" or place:
                return whole
        return min(total, whole)

    def written(self, computation: str, shape: str) -> int:
        """Bytes that a fusion writes: of a result that is an update in place, the update."""
        body = self.computations[computation]
        root = next(i for i in body.values() if i.is_root)
        results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return sum(
            min(self._update(result, body), hbm_bytes(x)) for result, x in zip(results, arrays(shape), strict=False)
        )

    def _update(self, result: Instruction, body: dict) -> int:
        while result.opcode == "bitcast":
            result = body[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            return hbm_bytes(body[result.operands[1]].shape, anywhere=True)
        if result.opcode == "fusion":
            return self.written(result.called("calls"), re.sub(r"S\(\d+\)", "", result.shape))
        return hbm_bytes(result.shape, anywhere=True)


def users(body: dict, name: str) -> Iterator[tuple[Instruction, int]]:
    """Who uses an instruction and as which operand; a bitcast's users are its source's."""
    for instruction in body.values():
        for place, operand in enumerate(instruction.operands):
            if operand == name and instruction.opcode == "bitcast":
                yield from users(body, instruction.name)
            elif operand == name:
                yield instruction, place


def parse(line: str) -> Instruction:
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
    """Return the arrays of a shape, a tuple's in order."""
    return [match.group() for match in ARRAY.finditer(shape)]


def hbm_bytes(shape: str, anywhere: bool = False) -> int:
    """Bytes in HBM of a shape, tiles filled up; `anywhere`: wherever it lies."""
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
        bits = BITS.get(dtype) or int(re.search(r"\d+", dtype).group()) if dtype not in ("token", "opaque") else 0
        total += math.prod(sizes) * bits // 8
    return total
