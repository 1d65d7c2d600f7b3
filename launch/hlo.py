"""Read from the text of a compiled TPU program what it moves and how long its compiler thinks that it takes.

`cost_analysis` counts the body of a loop once and does not tell HBM from VMEM. The text says both: a layout names the
memory space (`S(1)` is VMEM; none is HBM), and a loop compares its counter with a constant. So here the body of a loop
counts once a trip, and an array counts if it lies in HBM, with the padding of its tiles. An operand that a fusion
slices counts as the slice, one that it updates in place as the update, and a kernel's operands and results count once.
Collectives and operations are counted in the same way, those inside fusions too.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from launch.hlo_text import (
    COMPUTATION,
    INSTRUCTION,
    Instruction,
    arrays,
    group_size,
    hbm_bytes,
    parse,
    plain_bytes,
    sizes_of,
)

BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
UNKNOWN = 2**63 - 1  # the cycles that the compiler writes where it has no estimate
# These move nothing, or what they move is counted at the instruction that starts it.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all copy-done async-done async-update slice-done "  # noqa: SIM905
    "send-done recv-done call-done opt-barrier optimization-barrier partition-id replica-id add-dependency".split()
)
CALLS = ("call", "async-start", "call-start")  # the last one runs on the sparse cores of v5p, v6e and tpu7x
SLICES = frozenset({"dynamic-slice", "slice", "gather"})
# The least that a device sends, over the bytes of the whole array, where n devices share it (in a ring).
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-broadcast": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
CHAIN = re.compile(r'chain_id="(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')  # the compiler for GPUs writes it
# The kind of an exchange with other slices, which goes by way of the hosts, and the other slices: "{1,2}x{0:3}".
SLICES_SENT = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
SLICES_OF = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x')
BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


class Cost(NamedTuple):
    """What an instruction or a computation costs."""

    hbm_bytes: int = 0
    cycles: int = 0  # the compiler's estimate; it has none of kernels, of copies in flight and of some others

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        return Cost(self.hbm_bytes + times * other.hbm_bytes, self.cycles + times * other.cycles)


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, and how often a run of the program makes it."""

    kind: str  # a key of `SENT`
    array_bytes: int  # of the whole array that is gathered, reduced, scattered or sent on, without tiles' padding
    devices: int  # that share the array; with `dcn` one of each slice
    times: int
    dcn: bool = False  # between slices, over the data center's network

    @property
    def sent(self) -> float:
        """Return the bytes that a device sends in one run of the program."""
        return self.times * self.array_bytes * SENT[self.kind](self.devices)


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
        """Return the cost of one run of a computation, the entry unless named."""
        body = self.computations[computation or self.entry]
        return functools.reduce(Cost.plus, (self._cost(i, body) for i in body.values()), Cost())

    def _cost(self, instruction: Instruction, body: dict) -> Cost:
        opcode, shape = instruction.opcode, instruction.shape
        if opcode in FREE or "AllocateBuffer" in instruction.attributes:
            return Cost()
        if opcode == "while":
            trips = self.trips(instruction)
            return Cost().plus(self.cost(instruction.called("body")), trips)
        if opcode == "conditional":
            return max(map(self.cost, self.branches(instruction)))
        if opcode in CALLS:
            return self.cost(instruction.called("to_apply") or instruction.called("calls"))
        cycles = sum(int(found) for found in CYCLES.findall(instruction.attributes)[:1] if int(found) != UNKNOWN)
        operands = [body[name].shape for name in instruction.operands if name in body]
        if opcode in ("send", "recv"):  # of a tuple that begins with the array, which a host fetches or writes
            return Cost(hbm_bytes(arrays(shape)[0]), cycles)
        if opcode in ("copy-start", "slice-start"):  # of (target, source, semaphore) each side that lies in HBM counts
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

    @staticmethod
    def branches(instruction: Instruction) -> list[str]:
        """Return the names of the computations of which a conditional runs one."""
        branches = BRANCHES.search(instruction.attributes)
        names = re.findall(r"[\w.\-]+", branches.group(1)) if branches else []
        return names or [instruction.called(f"{case}_computation") for case in ("true", "false")]

    def runs(self, computation: str = "", times: int = 1) -> Iterator[tuple[Instruction, dict, int]]:
        """Yield every instruction that a computation runs, its own computation, and how often it runs.

        Instructions inside fusions are included, and those of all branches of a conditional, as if each ran.
        """
        body = self.computations[computation or self.entry]
        for instruction in body.values():
            yield instruction, body, times
            opcode, called = instruction.opcode, instruction.called
            if opcode == "while":
                yield from self.runs(called("body"), times * self.trips(instruction))
            elif opcode == "conditional":
                for name in self.branches(instruction):
                    yield from self.runs(name, times)
            elif opcode in (*CALLS, "fusion"):
                yield from self.runs(called("to_apply") or called("calls"), times)

    def collectives(self) -> list[Collective]:
        """Return the exchanges of one run of the entry.

        XLA cuts some exchanges into a chain of fusions, to compute meanwhile: a chain counts once. An all-reduce in a
        fusion that keeps only a part of the sum is a reduce-scatter. An exchange between slices is a send to the
        device's host, which exchanges it with the other hosts.
        """
        found, chains = [], set()
        scattering = {
            instruction.called("calls")
            for body in self.computations.values()
            for instruction in body.values()
            if instruction.opcode == "fusion" and "all-reduce-scatter" in instruction.name + instruction.called("calls")
        }
        scattered = {id(self.computations[name]) for name in scattering}
        for instruction, body, times in self.runs():
            if between := SLICES_SENT.search(instruction.attributes):
                if instruction.opcode == "send":
                    found.append(_between_slices(BETWEEN_SLICES[between.group(1)], instruction, body, times))
                continue
            kind = instruction.opcode.removesuffix("-start")
            chain = CHAIN.search(instruction.attributes)
            if kind not in SENT or (chain and chain.group(1) in chains):
                continue
            if chain:
                chains.add(chain.group(1))
            operands = [body[name].shape for name in instruction.operands if name in body]
            # The operand is the whole array, but that of an all-gather is one device's part.
            whole = sum(map(plain_bytes, operands))
            devices = group_size(instruction.attributes)
            if kind == "all-gather":
                whole *= devices
            if kind == "all-reduce" and id(body) in scattered:
                kind = "reduce-scatter"
            found.append(Collective(kind=kind, array_bytes=whole, devices=devices, times=times))
        return found

    def operations(self) -> int:
        """Count the operations of matrix products in one run of the entry, two a multiply-add; kernels say theirs."""
        return sum(times * _operations(instruction, body) for instruction, body, times in self.runs())

    def trips(self, loop: Instruction) -> int:
        """Return how often a loop runs: what the compiler says, or from the constant up to which its counter goes.

        Raises:
            ValueError: the compiler does not say, and the condition compares no counter with a constant.
        """
        if known := TRIPS.search(loop.attributes):
            return int(known.group(1))
        condition = loop.called("condition")
        found = self.computations[condition]
        root = compared = next(i for i in found.values() if i.is_root)
        bounds = [i for i in found.values() if i.opcode == "constant" and re.match(r"[su]32\[\]", i.shape)]
        if root.opcode == "fusion":  # it holds the comparison; the constant is outside of it
            root = next(i for i in self.computations[root.called("calls")].values() if i.is_root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes or len(bounds) != 1:
            raise ValueError(f"how often a loop runs is not in its condition {condition!r}")
        bound = int(re.match(r"\d+", bounds[0].operands[0]).group())
        counters = [found[name] for name in compared.operands if found[name].opcode == "get-tuple-element"]
        index = int(re.search(r"index=(\d+)", counters[0].attributes).group(1))
        body = self.computations[loop.called("body")]
        last = next(i for i in body.values() if i.is_root)
        return -(-bound // self._step(body[last.operands[index]], body))

    def _step(self, instruction: Instruction, body: dict) -> int:
        """Return how much a counter grows a trip: by the constant that is added to it, perhaps in a fusion; else 1."""
        if instruction.opcode == "fusion":
            body = self.computations[instruction.called("calls")]
            instruction = next(i for i in body.values() if i.is_root)
        added = [body[name] for name in instruction.operands if name in body and body[name].opcode == "constant"]
        if instruction.opcode != "add" or len(added) != 1:
            return 1
        return int(re.match(r"\d+", added[0].operands[0]).group())

    def read(self, computation: str, index: int) -> int:
        """Return the bytes that a fused computation reads of a parameter: if it only slices it, those of the slices."""
        body = self.computations[computation]
        source = next(i for i in body.values() if i.opcode == "parameter" and i.operands == (str(index),))
        whole, total = hbm_bytes(source.shape, anywhere=True), 0
        for user, place in self.users(body, source.name):
            if user.opcode in SLICES and place == 0:
                total += hbm_bytes(user.shape, anywhere=True)
            elif user.opcode == "fusion":
                total += self.read(user.called("calls"), place)
            elif user.opcode != "dynamic-update-slice" or place:
                return whole
        return min(total, whole)

    def users(self, body: dict, name: str) -> Iterator[tuple[Instruction, int]]:
        """Yield each user of an instruction of a fused computation, and as which operand it uses it.

        In place of a user that only changes the layout, as on tpu7x before a slice of another tiling, its own users are
        given.
        """
        for instruction in body.values():
            for place, operand in enumerate(instruction.operands):
                if operand == name and self._lays_out(instruction):
                    yield from self.users(body, instruction.name)
                elif operand == name:
                    yield instruction, place

    def _lays_out(self, instruction: Instruction) -> bool:
        if instruction.opcode == "fusion":
            inner = self.computations[instruction.called("calls")].values()
            return all(each.opcode in ("parameter", "copy", "bitcast") for each in inner)
        return instruction.opcode in ("copy", "bitcast")

    def written(self, computation: str, shape: str) -> int:
        """Return the bytes that a fusion writes: for a result that is updated in place, those of the update."""
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


def _between_slices(kind: str, instruction: Instruction, body: dict, times: int) -> Collective:
    """Return the exchange of this device with its counterparts in other slices, of which `instruction` is the send.

    Raises:
        ValueError: the text does not say how many slices take part.
    """
    shape = body[instruction.operands[0]].shape
    slices = SLICES_OF.search(instruction.attributes)
    if kind == "all-to-all":
        devices = sizes_of(shape)[0]  # a part for each
    elif kind == "collective-permute":
        devices = 1
    elif slices:
        devices = slices.group(1).count(",") + 1
    else:
        raise ValueError(f"between how many slices {instruction.name} is an {kind} is not in its program")
    whole = plain_bytes(shape) * (devices if kind == "all-gather" else 1)
    return Collective(kind, array_bytes=whole, devices=devices, times=times, dcn=True)


def _operations(instruction: Instruction, body: dict) -> int:
    if match := re.search(r'"?cost_estimate"?:\{"flops":"(\d+)"', instruction.attributes):
        return int(match.group(1))
    if instruction.opcode not in ("convolution", "dot"):
        return 0
    left, right = (sizes_of(body[name].shape) for name in instruction.operands)
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes).group(1)
        return 2 * math.prod(sizes_of(instruction.shape)) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    arrays_of = (left, right, sizes_of(instruction.shape))
    lhs, rhs, out = (dict(zip(names, sizes, strict=True)) for names, sizes in zip(labels, arrays_of, strict=True))
    written = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", written.group(1))) if written else {}
    taps = math.prod(_taps(place, window, lhs, rhs, out) for place in lhs if place not in "bf")
    return 2 * out["b"] * rhs["o"] * rhs["i"] * taps


def _taps(place: str, window: dict[str, str], lhs: dict, rhs: dict, out: dict) -> int:
    """Count, along one axis, the pairs of an output and a window position that read a number and not padding."""
    field = lambda name, default: window[name].split("x")[int(place)] if name in window else default  # noqa: E731
    low = int(field("pad", "0_0").split("_")[0])
    stride, spread, dilate = (int(field(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    last = (lhs[place] - 1) * spread
    met = (o * stride + w * dilate - low for o in range(out[place]) for w in range(rhs[place]))
    return sum(0 <= at <= last and at % spread == 0 for at in met)
