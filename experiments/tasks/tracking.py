"""What the three state-tracking tasks of the paper share: models, sizes, curriculum, learning rates.

Table 5b of arXiv:2603.15569: d_state 64, documents of 3 to 40 and at the end 3 to 160 tokens, the best of the learning
rates at length 256, in percent of the way from chance to perfect. The paper names neither optimizer nor head size, nor
whether there is a feed-forward; ours stand here. Its -A is a softplus, variant `softplus`; `mamba3` is as the released
code is now, with a heavier tail: -A falls to 0 more slowly as its logit falls, so that a state is forgotten sooner.

The paper trains 10,000 steps of 256 sequences. `LONG` is as many tokens, 256 M: its rows have 1.6 sequences on average.
The table is trained on a sixth of them; what differs from the paper there is trained again by the files called long.
"""

from mamba3_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

RATES = tuple(10 ** (-4 + 2 * i / 7) for i in range(8))  # 1e-4 .. 1e-2, evenly in their logarithm
LONG = {"steps": 10_000, "batch": 160}
LENGTHS = (40, 80, 160, 256, 512)
METRIC = "scaled_last@256"
SHOWN = ("scaled_last@40", "scaled_last@160", "scaled_last@256", "scaled_last@512")


def variants(layers: int) -> dict[str, dict]:
    """Return the table's models, each as deep as the others."""
    return {
        "mamba3": {},
        "softplus": {"model.a_form": "softplus"},
        "rope": {"model.angles": "rope"},
        "no_rotation": {"model.angles": "none"},
        "mamba2": {"model.pattern": "2" * layers},
        "gated_deltanet": {"model.pattern": "G" * layers, "model.delta_negative": True},
        "transformer": {"model.pattern": "A" * layers, "model.attn_rope_theta": 10000.0},
    }


def config(
    name: str, task: str, vocab_size: int, layers: int, d_ff: int, steps: int, labels: str = "every", batch: int = 64
) -> Config:
    """Return the config of a task: steps of `batch` rows of 160 tokens, packed with documents whose longest grows."""
    return Config(
        name=name,
        model=ModelConfig(
            vocab_size=vocab_size,
            pad_vocab_to=1,
            d_model=64,
            d_ff=d_ff,
            pattern="M" * layers,
            tie_embeddings=False,
            embedding_std=1.0,
            d_state=64,
            head_dim=32,
            rope_fraction=1.0,
            # A token turns by at most pi dt: half a turn needs dt of 1.
            dt_min=0.1,
            dt_max=1.0,
            delta_head_dim=32,
            attn_head_dim=16,
        ),
        data=DataConfig(
            source=task,
            length=160,
            batch=batch,
            valid_rows=2048,
            task_min_length=3,
            task_lengths=(40, 160),
            task_steps=(steps, 0),
            labels=labels,
        ),
        optimizer=OptimizerConfig(b2=0.99, weight_decay=0.0, clip=0.3),
        train=TrainConfig(steps=steps, log_every=200, eval_every=0, save_every=2000, keep=1),
    )
