"""Byte-level text: two Mamba-3 layers read the Python standard library's own source, which is on every machine.

    python -m launch.train --config=experiments/text.py --workdir=runs/text

Cost: 1.5 minutes on 2 CPU cores, compilation included (under 5 on slow ones). Expect about 1.9 bits per byte on files
held out (gzip -9 on the same files: 1.89); more steps go on improving it.
"""

from mamba3_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    # Small and narrow on purpose: within minutes on a CPU, more steps of a small model beat fewer of a large one.
    return Config(
        name="text",
        model=ModelConfig(vocab_size=256, d_model=64, pattern="MM", d_ff=128, d_state=16, head_dim=32),
        data=DataConfig(source="text", length=256, batch=4),
        optimizer=OptimizerConfig(learning_rate=6e-3, warmup=0.03),
        train=TrainConfig(steps=3600, log_every=100, eval_every=1200, eval_batches=64, save_every=1200),
    )
