"""MQAR on a CPU: who recalls four pairs, and is it harder to learn without a short convolution?

    python -m launch.sweep --config=experiments/tasks/mqar_small.py --workdir=runs/mqar_small

Multi-query recall as `mqar` has it, of 64 symbols and in documents of 32 tokens with four pairs; scored with four pairs
to four times that length, and with eight in 32 tokens. Two layers of about 70,000 parameters, without a feed-forward.
Mamba-2 has a convolution of its own. The figure of accuracy by step shows when each finds out.

Cost: 47 minutes on 2 CPU cores with a load of 20 beside it, and minutes on idle ones.

Expected: all recall, and Mamba-3 without a convolution finds out the latest ("somewhat harder", as its authors' blog
has it). In a trial with the convolution all queries were right after 500 steps. One seed and one learning rate, that of
this trial. A run of 300 steps, 30 of them of warm-up, stayed at guessing among a document's values.
"""

from experiments.tasks import mqar
from mamba3_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

VARIANTS = {
    "mamba3": {},
    "mamba3_conv": mqar.MIXERS["mamba3_conv"],
    "mamba2": mqar.MIXERS["mamba2"],
    "transformer": {"model.pattern": "AA", "model.attn_rope_theta": 10000.0},
}
LENGTHS = ("32:4", "64:4", "128:4", 32)
METRIC = "accuracy@32:4"
SHOWN = tuple(f"accuracy@{length}" for length in LENGTHS)
EXPECT = {
    "mamba3": ("best accuracy@32:4", 0.5, 1.0),
    "mamba3_conv": ("best accuracy@32:4", 0.99, 1.0),
    "mamba2": ("best accuracy@32:4", 0.9, 1.0),
    "transformer": ("best accuracy@32:4", 0.9, 1.0),
}


def get_config() -> Config:
    return Config(
        name="mqar_small",
        model=ModelConfig(
            vocab_size=64,
            d_model=64,
            pattern="MM",
            tie_embeddings=False,
            embedding_std=1.0,
            d_state=32,
            head_dim=32,
            attn_head_dim=32,
            chunk=32,
        ),
        data=DataConfig(
            source="mqar_64",
            length=32,
            batch=64,
            valid_rows=512,
            task_lengths=(32,),
            task_pairs=(4,),
            task_steps=(0,),
        ),
        optimizer=OptimizerConfig(learning_rate=6e-3, b2=0.99, weight_decay=0.1),
        train=TrainConfig(steps=900, log_every=30, eval_every=0, save_every=300, keep=1),
    )
