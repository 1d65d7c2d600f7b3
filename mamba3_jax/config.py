"""Every default in one place, with the range that each number may have. A run is one `Config`.

Flags override any field by its path (--config.model.d_state=64). The dataclasses are not frozen, because
`ml_collections.config_flags` assigns to their fields.
"""

import copy
import dataclasses
import difflib
import math
import struct
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field

WIDTH = 2**16  # of anything in a layer: four times that of the widest models
LAYERS = 2**10
LENGTH = 2**27  # tokens in a row
COUNT = 2**31 - 1  # steps are counted in int32
SEED = 2**32 - 1
TINY = 2.0**-126  # the smallest float32 that devices do not take for 0


def size(default: int | tuple[int, ...], least: int = 1, most: int = WIDTH):
    """Declare a whole number, or a tuple of them, from `least` to `most`."""
    return field(default=default, metadata={"range": (least, most)})


def number(default: float, interval: str = "[0, inf)"):
    """Declare a float32 number in an interval in mathematical notation: "(0, 1]" excludes 0 and includes 1."""
    return field(default=default, metadata={"interval": interval})


class Section:
    """A dataclass that has no attributes but its fields: a misspelt name in a config file is an error."""

    def __setattr__(self, name, value):
        if name not in self.__dataclass_fields__:
            raise AttributeError(no_field(type(self).__name__, name, self.__dataclass_fields__))
        super().__setattr__(name, value)


def no_field(where: str, name: str, fields) -> str:
    """Say that there is no such field, which one may be meant, and which fields there are."""
    close = difflib.get_close_matches(name, fields, 1)
    hint = f", did you mean {close[0]}?" if close else ";"
    return f"{where} has no field {name!r}{hint} it has {', '.join(fields) or 'none'}"


@dataclass
class ModelConfig(Section):
    """Sizes and choices of a language model. Names follow the official code where it has one."""

    vocab_size: int = size(256, most=2**24)
    pad_vocab_to: int = size(8)  # the embedding's rows are rounded up to a multiple of this
    d_model: int = size(256)
    # One letter for each layer, `Mixer.letter`: M Mamba-3, 2 Mamba-2, 1 Mamba-1, G gated DeltaNet, A attention. In a
    # config file it may also be a tuple of names in `MIXERS`; a flag can only give a string.
    pattern: str = field(default="MM", metadata={"or": tuple[str, ...], "layers": LAYERS})
    d_ff: int = size(0, 0, 2**20)  # width of the SwiGLU feed-forward after every mixer; 0: none
    embedding_std: float = number(0.02)  # of the embedding's initial values
    tie_embeddings: bool = True
    norm: str = "rms"  # rms | layer
    residual_in_fp32: bool = True

    # Mamba-3 and Mamba-2. Mamba-1 and gated DeltaNet also read dt_min, dt_max, dt_init_floor and chunk; Mamba-1 expand
    d_state: int = size(128)
    expand: int = size(2, most=256)
    head_dim: int = size(64)
    n_groups: int = size(1)
    dt_min: float = number(0.001, "(0, inf)")  # initial dt is log-uniform in [dt_min, dt_max]
    dt_max: float = number(0.1, "(0, inf)")
    dt_init_floor: float = number(1e-4)
    implementation: str = ""  # of the op; "": the fastest for the device
    chunk: int = size(0, 0)  # tokens in a chunk of the op; 0: the implementation chooses

    # Mamba-3
    mimo_rank: int = size(0, 0, 256)  # 0: SISO; r >= 1: MIMO of rank r (rank 1 is still MIMO: its planes are halves)
    rope_fraction: float = number(0.5, "(0, 1]")  # 0.5 | 1.0 of the state rotates
    out_norm: bool = False  # RMSNorm of each head before the gate ("pre-gate grouped")
    a_floor: float = number(1e-4, "(0, inf)")
    discretization: str = "exponential_trapezoidal"  # a row of DISCRETIZATIONS in ops/discretize.py
    # How the state rotates. data: pairs of entries, by angles that depend on the data | rope: pairs, by the angle
    # t * 10000^(-i/S) at token t | none | quaternion: groups of four entries, by unit quaternions that depend on the
    # data and do not commute
    angles: str = "data"
    bc_bias: str = "both"  # which of B and C (here k and q) have a bias: both | b | c | none (see the paper's table 5a)
    bc_bias_initial: float = number(1.0, "(-inf, inf)")
    bc_bias_frozen: bool = False  # biases keep their initial values
    bc_norm: bool = True  # RMSNorm of k and q before their biases
    conv: int = size(0, 0, 16)  # tokens that a short convolution of v, k and q sees, Mamba-2's; 0: there is none
    # The decay rate -A. heavy_tail: of the token's own u | softplus: of u, as official layers had it before June 2026 |
    # learned: one number for each head
    a_form: str = "heavy_tail"
    # Which two entries of the state rotate together: adjacent | half: half a state apart. "": as in official layers,
    # half for MIMO and adjacent for SISO
    pairing: str = ""

    # Mamba-2, Mamba-1 and gated DeltaNet
    d_conv: int = size(4, 2, 16)  # tokens that the short convolution sees

    # Mamba-1
    mamba1_state: int = size(16)  # of every channel
    mamba1_rank: int = size(0, 0)  # of the projection of dt; 0: d_model / 16, rounded up

    # gated DeltaNet
    delta_heads: int = size(0, 0)  # 0: d_model // delta_head_dim
    delta_head_dim: int = size(128)  # of queries and keys
    delta_expand: int = size(2, most=256)  # the width of values over that of queries and keys
    delta_negative: bool = False  # doubles b: a step has eigenvalues in (-1, 1), not in (0, 1), for state tracking

    # attention
    attn_heads: int = size(0, 0)  # 0: d_model // attn_head_dim
    attn_kv_heads: int = size(0, 0)  # 0: as many as attn_heads
    attn_head_dim: int = size(64)
    attn_rope_theta: float = number(0.0)  # 0: no positional embedding (the paper's hybrids)
    attn_bias: bool = False
    # cudnn (NVIDIA GPUs, bfloat16, calls without a state) | plain. "": cudnn where it can run, unless rows are short or
    # its mask of documents is too large
    attn_implementation: str = ""

    # how it is run
    compute_dtype: str = "float32"  # float32 | bfloat16; parameters stay float32
    # What the backward pass computes again. none: nothing | rotation: the kernels' rotated queries and keys, which are
    # most of their residuals; their outputs and states are kept | op: the whole op; its inputs are kept | block: the
    # layer. "": training takes the first of none, rotation and block whose step fits into the device's memory
    remat: str = ""
    # Which tokens of a row each device on the mesh axis `sequence` has. contiguous: one run | zigzag: an early run and
    # a late one, which divides the work of attention evenly
    layout: str = "contiguous"
    unroll: int = size(0, 0, LAYERS)  # repeats of a segment in one iteration of the scan over layers; 0: by device


@dataclass
class DataConfig(Section):
    """Where tokens come from. `length` and `batch` are those of a global batch."""

    source: str = "text"  # text | tfds | a task of data/synthetic.py: parity, arithmetic, S3, ...
    tokenizer: str = "bytes"  # bytes, or the path of a Hugging Face tokenizer.json
    eos: str = ""  # the token, or its id, that ends a document; "": what the files beside tokenizer.json name
    separator: str = ""  # what separates the documents of a text file, e.g. <|endoftext|>; "": a file is one document
    key: str = "text"  # the field, or column, of JSON lines and Parquet that holds a document
    train_glob: str = ""  # text, .jsonl or .parquet files; "": the Python standard library's own source
    valid_glob: str = ""  # "": one file in twenty of train_glob, chosen by a hash of its path
    tfds_name: str = ""
    tfds_dir: str = ""
    tfds_train_split: str = "train"
    tfds_valid_split: str = "validation"
    tfds_key: str = "text"
    length: int = size(256, 2, LENGTH)
    batch: int = size(8, most=2**20)
    seed: int = size(0, 0, SEED)
    workers: int = size(0, 0, 1024)  # grain worker processes; 0: in this process
    # The curriculum of a generated task: in stage i documents have task_lengths[i] tokens, for task_steps[i] steps
    task_lengths: tuple[int, ...] = size((40, 160), 1, LENGTH)
    task_steps: tuple[int, ...] = size((400, 500), 0, COUNT)
    # If not 0, the documents of a step have one length, drawn between this one and a longest one, which rises linearly
    # from task_lengths[i] to task_lengths[i + 1] over task_steps[i] steps. The paper: 3, (40, 160), (10000, 0)
    task_min_length: int = size(0, 0, LENGTH)
    # The stage of each step is drawn, stage i with probability task_steps[i] / sum(task_steps); False: in order
    task_mixed: bool = False
    # Key-value pairs in the documents of each stage, for tasks that have them; 0 or (): as many as the task has for a
    # document of this length
    task_pairs: tuple[int, ...] = size((), 0, LENGTH)
    task_packed: bool = True  # rows are full of documents; False: one a row, and padding that is not scored
    labels: str = "every"  # which tokens of a generated task are scored: every (one that has a target) | answer
    valid_rows: int = size(256, 1, COUNT)  # validation rows of a generated task; text has its own number of them


BUILT = {"build/corpus/": "python -m experiments.corpus"}  # folders of data, and the commands that make them


def what_builds(path: str) -> str:
    """Say which command makes a missing file of data; "" if none does."""
    commands = [command for place, command in BUILT.items() if place in path]
    return f": `{commands[0]}` builds it" if commands else ""


@dataclass
class OptimizerConfig(Section):
    """The optimizer and its schedule."""

    # adamw | muon: Muon orthogonalises the updates of the layers' matrices, AdamW updates all other parameters
    # (train/muon.py says which is which). Muon's updates are scaled to be as large as AdamW's, so AdamW's learning rate
    # and weight decay are where to begin (arXiv:2502.16982).
    name: str = "adamw"
    learning_rate: float = number(3e-3, "(0, inf)")
    schedule: str = "cosine"  # cosine | wsd | constant
    warmup: float = number(0.1, "[0, 1)")  # fraction of the steps
    decay: float = number(0.2, "[0, 1]")  # wsd: the fraction of the steps at the end that decays
    final: float = number(0.01)  # the last learning rate over the peak
    b1: float = number(0.9, "[0, 1)")
    b2: float = number(0.95, "[0, 1)")
    momentum: float = number(0.95, "[0, 1)")  # Muon's, Nesterov; b1 and b2 are Adam's
    eps: float = number(1e-8, "(0, inf)")
    weight_decay: float = number(0.1)  # of all parameters but dt_bias, A_log, D, norms and biases
    clip: float = number(1.0)  # global norm; 0: off
    accumulate: int = size(1, most=2**20)  # micro-batches a step: `data.batch` is split into this many


@dataclass
class TrainConfig(Section):
    """The training loop."""

    steps: int = size(1000, 1, COUNT)
    log_every: int = size(10, 1, COUNT)
    eval_every: int = size(200, 0, COUNT)  # 0: never
    eval_batches: int = size(8, 0, 2**20)
    save_every: int = size(200, 1, COUNT)
    keep: int = size(2, 1, COUNT)  # how many of the newest checkpoints stay on disk
    keep_best: bool = True  # the checkpoint of the lowest validation loss stays too
    z_loss: float = number(0.0)
    max_bad_steps: int = size(10, 1, COUNT)  # non-finite updates in a row before the run stops
    # axis:size, separated by commas; the size -1 takes the devices that are left. data splits rows | fsdp: rows,
    # parameters and the optimizer's moments | tensor: heads, the feed-forward and the vocabulary | sequence: the
    # length. Over several slices of TPUs, or hosts of GPUs, lies data, or the axis whose size says so: fsdp:2x8 lies
    # over 2 slices, with 8 devices in each.
    mesh: str = "data:-1"
    # Of one device, for model-FLOPs utilisation. 0: as the table of devices says; of other devices there is no figure
    peak_tflops: float = number(0.0)


@dataclass
class Config(Section):
    """One run."""

    name: str = "mamba3"
    seed: int = size(0, 0, SEED)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def to_dict(config: Config) -> dict:
    """Return a config as nested dicts of plain values, for JSON."""
    return dataclasses.asdict(config)


def with_fields(config: Config, fields: dict[str, object]) -> Config:
    """Return a copy in which fields, given by paths such as "model.d_state", have other values.

    Raises:
        ValueError: a path names no field.
    """
    changed = copy.deepcopy(config)
    for path, value in fields.items():
        *sections, name = path.split(".")
        section, where = changed, "config"
        for part in (*sections, name):
            names = [field.name for field in dataclasses.fields(section)] if dataclasses.is_dataclass(section) else []
            if part not in names:
                raise ValueError(no_field(where, part, names))
            if part is not name:
                section, where = getattr(section, part), f"{where}.{part}"
        setattr(section, name, value)
    return changed


# Configs that earlier versions saved: fields that have another name now (and the new values, where these changed too),
# and values that have another name, by field.
RENAMED_FIELDS = {
    "parity_lengths": ("task_lengths", {}),
    "parity_steps": ("task_steps", {}),
    "scan_layers": ("unroll", {True: 0, False: LAYERS}),
}
RENAMED = {
    "discretization": {"trapezoid": "exponential_trapezoidal", "euler": "exponential_euler"},
    "bc_bias": {True: "both", False: "none"},
}


def from_dict(values: dict) -> Config:
    """Invert `to_dict`: lists become tuples, an absent field keeps its default, an unknown one is a ValueError."""
    return _section(Config, values, "config")


def _section(kind, values: dict, path: str):
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for before, (now, changed) in RENAMED_FIELDS.items():
        if now in fields and before in values:
            value = values[before]
            rest = {name: other for name, other in values.items() if name != before}
            values = rest | {now: changed[value] if changed else value}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{path} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    parts = {
        name: _section(fields[name], value, f"{path}.{name}") if dataclasses.is_dataclass(fields[name]) else value
        for name, value in values.items()
    }
    parts |= {name: RENAMED[name].get(part, part) for name, part in parts.items() if name in RENAMED}
    return kind(**{name: tuple(part) if isinstance(part, list) else part for name, part in parts.items()})


def check(section: Section, path: str = "config") -> None:
    """Raise ValueError for the first value that is not of its field's declared type or not in its range."""
    for declared in dataclasses.fields(section):
        value, name, kind = getattr(section, declared.name), f"{path}.{declared.name}", declared.type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise ValueError(f"{name}={shown(value)} is not a {kind.__name__}")
            check(value, name)
        elif not (_is(value, kind) or _is(value, declared.metadata.get("or", ()))):
            kind = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{name}={shown(value)} is not of type {kind}")
        elif wish := _wish(value, declared.metadata):
            raise ValueError(f"{name}={shown(value)} {wish}")


def shown(value) -> str:
    """Write a value as Python does, without its middle if that is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:50]}...{text[-20:]}"


def listed(items: Iterable, between: str = ", ", limit: int = 10) -> str:
    """Join the first items of what may be a long list, and say how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return between.join(items[:limit]) + more


def _is(value, kind) -> bool:
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(part, typing.get_args(kind)[0]) for part in value)
    if kind is float:
        kind = (int, float)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _wish(value, metadata) -> str:
    """Say how a value of the right type is out of its range; "" if it is not."""
    if interval := metadata.get("interval"):
        return "" if in_float32(value, interval) else f"is not a float32 number in {interval}"
    if "layers" in metadata:
        most = metadata["layers"]
        return "" if 1 <= len(value) <= most else f"has {len(value)} layers, wanted 1 .. {most}"
    if "range" in metadata:
        least, most = metadata["range"]
        numbers = value if isinstance(value, tuple) else (value,)
        return "" if all(least <= part <= most for part in numbers) else f"is not in {least} .. {most}"
    return ""


def in_float32(value: float, interval: str) -> bool:
    """Tell whether the float32 nearest to a value is a number in the interval, and is 0 only if the value is."""
    try:
        (nearest,) = struct.unpack("f", struct.pack("f", value))
    except (OverflowError, struct.error):  # the latter for integers that are too large for a double
        return False
    low, high = map(float, interval[1:-1].split(","))
    above = nearest > low if interval[0] == "(" else nearest >= low
    below = nearest < high if interval[-1] == ")" else nearest <= high
    return above and below and math.isfinite(nearest) and (value == 0 or abs(nearest) >= TINY)
