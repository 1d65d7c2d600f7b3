"""What was measured as fastest, by device and shape: tuned.json, which `experiments.benchmarks.tune` writes."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax

from mamba3_jax.ops.types import Tokens, product_dtype

PATH = Path(__file__).with_name("tuned.json")
# A device that was not measured takes the entries of others of its architecture.
ARCHITECTURES = {
    "Ampere": r"A100|A800|A30|A10G?|A40|A6000|RTX 30\d\d",
    "Ada": r"L4|L40S?|L20|RTX 40\d\d",
    "Hopper": r"H100|H200|H800|H20|GH200",
    "Blackwell": r"B100|B200|B300|GB200|GB300|RTX 50\d\d",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One entry of the table: what to run, and how, for inputs of this kind on this device."""

    device: str  # jax's device_kind
    rank: int
    dtype: str  # of q, k and v
    width: int  # P, rounded up to a power of two
    d_state: int  # N, rounded up to a power of two
    heads: int  # times the batch
    length: int
    implementation: str
    launch: dict = dataclasses.field(default_factory=dict)  # options of each implementation, by its name
    measured: dict = dataclasses.field(default_factory=dict)  # ms of forward+backward by implementation, commit, date


def device():
    """Return the device that the traced program is for: that of the mesh in context, or else this process's first one.

    If this process has no device of the mesh's kind, as for the mesh of a topology, only kind and platform are known.
    (`pallas_kernels.device.target` does the same: kernels import nothing of this package, which works without them.)
    """
    wanted = jax.sharding.get_abstract_mesh().abstract_device
    here = jax.devices()
    return next((device for device in here if wanted is None or device.device_kind == wanted.device_kind), wanted)


def choose(device: str, tokens: Tokens) -> Choice | None:
    """Return the entry for these inputs, of this device or else of one of its architecture; None: there is none.

    Rank, dtype, sizes of the state, and whether rows are one token, must be those of the entry. Of such entries, the
    nearest in batch x heads and length is taken.
    """
    batch, length, rank, _, d_state = tokens.q_BLRGN.shape
    heads, width = batch * tokens.v_BLHP.shape[2], tokens.v_BLHP.shape[3]
    dtype = product_dtype(tokens).name
    kind = (rank, dtype, rounded(width), rounded(d_state), length == 1)

    def fits(entry: Choice) -> bool:
        return kind == (entry.rank, entry.dtype, entry.width, entry.d_state, entry.length == 1)

    def distance(entry: Choice) -> float:
        return abs(math.log2(entry.heads / heads)) + abs(math.log2(entry.length / length))

    found = [entry for entry in table() if fits(entry)]
    own = [entry for entry in found if entry.device == device]
    akin = [entry for entry in found if architecture(entry.device) == architecture(device) is not None]
    return min(own or akin, key=distance, default=None)


def config(implementation: str, tokens: Tokens) -> dict:
    """Return the options that the table has for this implementation, these inputs and this device; often none."""
    entry = choose(device().device_kind, tokens)
    told = entry.launch.get(implementation, {}) if entry else {}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}


def rounded(size: int) -> int:
    """Return the smallest power of two that is not less than a size."""
    return 1 << (size - 1).bit_length()


def architecture(device: str) -> str | None:
    """Return NVIDIA's name for a device's architecture; None: it is not known."""
    for name, models in ARCHITECTURES.items():
        if re.search(rf"\b({models})\b", device):
            return name
    return None


def table() -> tuple[Choice, ...]:
    """Return all entries."""
    return read(PATH)


@functools.cache
def read(path: Path) -> tuple[Choice, ...]:
    """Return all entries of a file.

    Raises:
        ValueError: the file is not JSON, or has an entry that is not a `Choice`; the message says which and why.
    """
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return tuple(_entry(values, f"{path}, entry {number}") for number, values in enumerate(entries))


def _entry(values, where: str) -> Choice:
    fields = {field.name: field for field in dataclasses.fields(Choice)}
    needed = {name for name, field in fields.items() if field.default_factory is dataclasses.MISSING}
    if not isinstance(values, dict) or set(values) - set(fields) or needed - set(values):
        raise ValueError(f"{where}: {values} has not the fields {', '.join(fields)}")
    for name, value in values.items():
        kind = fields[name].type
        if type(value) is not kind or (kind is int and value < 1):
            raise ValueError(f"{where}: {name}={value!r} is not a {'positive ' * (kind is int)}{kind.__name__}")
    return Choice(**values)
