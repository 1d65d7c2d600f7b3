"""Every default in one place. A run is one `Config`; flags override any field by its path (--config.model.d_state=64).

Plain dataclasses, not frozen: `ml_collections.config_flags` assigns to their fields.
"""

import dataclasses
from dataclasses import dataclass, field


@dataclass
class ModelConfig:
    """Sizes and choices of a language model. Names follow the official code where it has one."""

    vocab_size: int = 256
    pad_vocab_to: int = 8  # the embedding's rows are rounded up to a multiple of this
    d_model: int = 256
    # One letter a layer, see mixers.LETTERS: M Mamba-3, A attention. In a config file also a tuple of names; the
    # declared type is what a flag gives.
    pattern: str = field(default="MM", metadata={"or": tuple[str, ...]})
    d_ff: int = 0  # width of the SwiGLU feed-forward after every mixer; 0: none
    embedding_std: float = 0.02  # of the embedding's initial values
    tie_embeddings: bool = True
    norm: str = "rms"  # rms | layer
    residual_in_fp32: bool = True

    # Mamba-3
    d_state: int = 128
    expand: int = 2
    head_dim: int = 64
    n_groups: int = 1
    mimo_rank: int = 0  # 0: SISO; r >= 1: MIMO of rank r (rank 1 is still MIMO: its planes are halves)
    rope_fraction: float = 0.5  # 0.5 | 1.0 of the state rotates
    out_norm: bool = False  # RMSNorm of each head before the gate ("pre-gate grouped")
    a_floor: float = 1e-4
    dt_min: float = 0.001  # initial dt is log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    discretization: str = "exponential_trapezoidal"  # a row of DISCRETIZATIONS in ops/discretize.py
    angles: str = "data"  # data | rope (fixed angles t * 10000^(-i/S), not data dependent) | none
    bc_bias: bool = True  # the biases of B and C (paper table 5a without: False)
    implementation: str = ""  # of the op; "": the fastest for the backend
    chunk: int = 0  # tokens a chunk of the op; 0: chosen

    # attention
    attn_heads: int = 0  # 0: d_model // attn_head_dim
    attn_kv_heads: int = 0  # 0: as many as attn_heads
    attn_head_dim: int = 64
    attn_rope_theta: float = 0.0  # 0: no positional embedding (the paper's hybrids)
    attn_bias: bool = False

    # how it is run
    compute_dtype: str = "float32"  # float32 | bfloat16; parameters stay float32
    # What the backward pass computes again: none | rotation: the kernels' rotated queries and keys, most of what they
    # keep; their outputs and states are kept | op: the whole op; its inputs are kept | block: the layer
    remat: str = "none"
    scan_layers: bool = True


@dataclass
class DataConfig:
    """Where tokens come from. `length` and `batch` are of one global batch."""

    source: str = "text"  # text | tfds | parity
    tokenizer: str = "bytes"  # bytes, or the path of a Hugging Face tokenizer.json
    train_glob: str = ""  # text files; "": the Python standard library's own source
    valid_glob: str = ""  # "": one file in twenty of train_glob, chosen by a hash of its path
    tfds_name: str = ""
    tfds_dir: str = ""
    tfds_train_split: str = "train"
    tfds_valid_split: str = "validation"
    tfds_key: str = "text"
    length: int = 256
    batch: int = 8
    seed: int = 0
    workers: int = 0  # grain worker processes; 0: in this process
    parity_lengths: tuple[int, ...] = (40, 160)  # curriculum: document lengths of the parity task
    parity_steps: tuple[int, ...] = (400, 500)  # and the steps spent at each
    valid_rows: int = 256  # of a generated task; text has as many as it has


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 3e-3
    schedule: str = "cosine"  # cosine | wsd | constant
    warmup: float = 0.1  # fraction of the steps
    decay: float = 0.2  # wsd: the fraction of the steps at the end that decays
    final: float = 0.01  # the last learning rate over the peak
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # not on dt_bias, D, norms and biases
    clip: float = 1.0  # global norm; 0: off
    accumulate: int = 1  # micro-batches a step: `data.batch` is split into this many


@dataclass
class TrainConfig:
    """The loop around the step."""

    steps: int = 1000
    log_every: int = 10
    eval_every: int = 200  # 0: never
    eval_batches: int = 8
    save_every: int = 200
    keep: int = 2  # newest checkpoints
    keep_best: bool = True  # and the one of the lowest validation loss
    z_loss: float = 0.0
    max_bad_steps: int = 10  # non-finite updates in a row before the run stops
    mesh: str = "data:-1"  # axis:size, comma separated; -1: the devices that are left
    peak_tflops: float = 0.0  # of one device, for model-FLOPs utilisation; 0: from the device table, else left out


@dataclass
class Config:
    """One run."""

    name: str = "mamba3"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def to_dict(config: Config) -> dict:
    """Nested plain values, for JSON."""
    return dataclasses.asdict(config)


# Values that earlier versions saved, by field: what they are called now.
RENAMED = {"discretization": {"trapezoid": "exponential_trapezoidal", "euler": "exponential_euler"}}


def from_dict(values: dict) -> Config:
    """The inverse of `to_dict`: lists become tuples, an absent field keeps its default, an unknown one: ValueError."""
    return _section(Config, values, "config")


def _section(kind, values: dict, path: str):
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{path} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
    parts = {
        name: _section(fields[name], value, f"{path}.{name}") if dataclasses.is_dataclass(fields[name]) else value
        for name, value in values.items()
    }
    parts |= {name: RENAMED[name].get(part, part) for name, part in parts.items() if name in RENAMED}
    return kind(**{name: tuple(part) if isinstance(part, list) else part for name, part in parts.items()})
