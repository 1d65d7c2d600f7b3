"""Needle in a haystack: which models, trained from nothing to find a value of four tokens, find it in longer haystacks?

    python -m launch.sweep --config=experiments/tasks/needle.py --workdir=runs/needle

After RULER's NIAH, which arXiv:2603.15569 (table 4) asks of language models of 1.5B. There, at twice the trained
length, a Transformer with RoPE finds nothing (single 1: 0 percent), Mamba-3 88, the hybrid 36, and the hybrid with the
grouped norm before the gate 100. A model of a few million parameters does not do it untrained, so this one is trained:
task `needle_alike`, whose hay is of the symbols that needles are made of. Documents grow from 64 tokens with one needle
to 512 tokens with eight of different keys, one of which is asked for at the end, and are scored at 1, 2 and 4 times
that. `exact` is the share of documents whose whole value is right. Six layers; the hybrid's last is attention without
positions.

Cost: 7 to 12 minutes on one H200 as estimated, 60 to 100 s a variant: 2 rates and 2 seeds of 66 million tokens each, 5
million parameters, at 15% of its peak in bfloat16.

Expected before any run, as the paper's table has it in kind: all find it at the trained length, the Transformer with
RoPE does not at four times that, and the hybrid with the norm does at twice.
"""

from mamba3_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from mamba3_jax.data.recall import NEEDLE_SYMBOLS

VARIANTS = {
    "mamba3": {},
    "mamba3_norm": {"model.out_norm": True},
    "hybrid": {"model.pattern": "MMMMMA"},
    "hybrid_norm": {"model.pattern": "MMMMMA", "model.out_norm": True},
    "mamba2": {"model.pattern": "2" * 6},
    "transformer": {"model.pattern": "A" * 6, "model.attn_rope_theta": 10000.0},
    "transformer_nope": {"model.pattern": "A" * 6},
}
SEEDS, LEARNING_RATES = 2, (1e-3, 3e-3)
LENGTHS = (512, "512:8", 1024, "1024:8", 2048, "2048:8")  # a length alone: with one needle
METRIC = "exact@512:8"
SHOWN = tuple(f"exact@{length}" for length in LENGTHS)
EXPECT = {
    "mamba3": ("best exact@512", 0.95, 1.0),
    "hybrid": ("best exact@512", 0.95, 1.0),
    "hybrid_norm": ("best exact@1024", 0.9, 1.0),
    "mamba2": ("best exact@512", 0.95, 1.0),
    "transformer": ("best exact@2048", 0.0, 0.5),
}


def get_config() -> Config:
    return Config(
        name="needle",
        model=ModelConfig(
            vocab_size=len(NEEDLE_SYMBOLS),
            d_model=256,
            d_ff=512,
            pattern="M" * 6,
            tie_embeddings=False,
            embedding_std=1.0,
            d_state=64,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(
            source="needle_alike",
            labels="answer",
            length=512,
            batch=64,
            valid_rows=512,
            task_lengths=(64, 128, 256, 512),
            task_pairs=(1, 2, 4, 8),
            task_steps=(300, 300, 400, 1000),
        ),
        optimizer=OptimizerConfig(weight_decay=0.1),
        train=TrainConfig(steps=2000, log_every=100, eval_every=0, save_every=1000, keep=1),
    )
