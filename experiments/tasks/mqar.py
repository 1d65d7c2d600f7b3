"""MQAR: how many pairs does a state of so many bytes recall, and does a short convolution help (zoology's set-up)?

    python -m launch.sweep --config=experiments/tasks/mqar.py --workdir=runs/mqar

Multi-query associative recall as HazyResearch/zoology has it now (experiments/mqar_example_configs/
original_mqar_configs.py): 8,192 symbols; training documents of (length, pairs) (64, 4), (128, 8), (256, 16), (256, 32)
and (256, 64), 100,000 of the first and 20,000 of each other an epoch; two layers without feed-forward, AdamW with decay
0.1, a cosine, its paper's four rates; tests of 1,000 documents of (64, 4), (64, 8), and of 64 to 1,024 tokens with as
many pairs as there is room for, a quarter of them. Mamba-2's d_state and every width are among zoology's.

Zoology's batches are 256 documents of one kind. Here a step draws its kind, and its rows of 256 tokens are full of
documents of that kind, each computed as if it were alone: every step has one compiled shape, and none of it is padding,
which in rows of one document would be three quarters of most steps. Kinds are drawn by their tokens, 50 : 20 : 40 : 40
: 40, so that documents have zoology's shares. They are fresh ones, 5 of its epochs; it takes 32 times the same.

Cost: 26 to 45 minutes on one H200 as estimated, 60 to 100 s a variant: 4 rates of 131 million tokens. The sweeps of
state tracking ran at 9.7 million tokens/s of 8 members together, without a head of 8,192 symbols.

Expected before any run, as zoology shows figures and no numbers: attention and gated DeltaNet recall 64 pairs in 256
tokens, the smallest states do not, and without a convolution Mamba-3 needs a larger state than with one.
"""

import jax

from mamba3_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, with_fields
from mamba3_jax.model import LanguageModel

MIXERS = {
    "mamba3": {},
    "mamba3_conv": {"model.conv": 4},
    "mimo": {"model.mimo_rank": 4},
    "mimo_conv": {"model.mimo_rank": 4, "model.conv": 4},
    "mamba2": {"model.pattern": "22"},
}
WIDTHS = ((64, 8), (64, 24), (128, 24), (256, 24))  # d_model and d_state
KEYS = ((64, 16), (64, 32), (128, 48), (256, 64))  # d_model and width of keys of two heads, whose values are twice that
ATTENTION = (64, 128)  # d_model


def lines() -> dict[str, dict[str, dict]]:
    """Return the variants of each line of the figure, by name."""
    found = {
        mixer: {
            f"{mixer}_{width}_{state}": {**fields, "model.d_model": width, "model.d_state": state}
            for width, state in WIDTHS
        }
        for mixer, fields in MIXERS.items()
    }
    delta = {"model.pattern": "GG", "model.delta_heads": 2}
    found["gated_deltanet"] = {
        f"gated_deltanet_{width}_{keys}": {**delta, "model.d_model": width, "model.delta_head_dim": keys}
        for width, keys in KEYS
    }
    attention = {"model.pattern": "AA", "model.attn_rope_theta": 10000.0}
    found["transformer"] = {
        f"transformer_{width}": {**attention, "model.d_model": width, "model.attn_head_dim": width // 2}
        for width in ATTENTION
    }
    return found


def state_kib(config: Config, fields: dict) -> float:
    """Return what a variant keeps of a row of the trained length, in KiB: states, short convolutions, caches."""
    model = LanguageModel(with_fields(config, fields).model)
    shapes = jax.eval_shape(lambda: model.empty_state(1, config.data.length))
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(shapes)) / 1024


def get_config() -> Config:
    return Config(
        name="mqar",
        # Head and embeddings as in `mqar_small`, where they are seen to learn it; zoology ties them, of deviation 0.02.
        model=ModelConfig(
            vocab_size=8192, pattern="MM", tie_embeddings=False, embedding_std=1.0, compute_dtype="bfloat16"
        ),
        data=DataConfig(
            source="mqar",
            length=256,
            batch=128,
            valid_rows=1000,
            task_lengths=(64, 128, 256, 256, 256),
            task_pairs=(4, 8, 16, 32, 64),
            task_steps=(50, 20, 40, 40, 40),
            task_mixed=True,
        ),
        optimizer=OptimizerConfig(weight_decay=0.1),
        train=TrainConfig(steps=4000, log_every=200, eval_every=0, save_every=2000, keep=1),
    )


VARIANTS = {name: fields for line in lines().values() for name, fields in line.items()}
SIZES = {
    label: {name: state_kib(get_config(), fields) for name, fields in line.items()} for label, line in lines().items()
}
SIZE = "state of a row of 256 tokens, KiB"
LEARNING_RATES = (1e-4, 4.6e-4, 2.2e-3, 1e-2)
LENGTHS = ("64:4", "64:8", 64, 128, 256, 512, 1024)  # a length alone: with as many pairs as it holds, a quarter of it
METRIC = "accuracy@256"
SHOWN = tuple(f"accuracy@{length}" for length in LENGTHS)
EXPECT = {
    "mamba3_64_8": ("best accuracy@256", 0.0, 0.6),
    "mamba3_conv_256_24": ("best accuracy@64:4", 0.99, 1.0),
    "mamba2_64_8": ("best accuracy@256", 0.0, 0.6),
    "mamba2_256_24": ("best accuracy@64:4", 0.99, 1.0),
    "gated_deltanet_256_64": ("best accuracy@256", 0.95, 1.0),
    "transformer_128": ("best accuracy@256", 0.99, 1.0),
}
