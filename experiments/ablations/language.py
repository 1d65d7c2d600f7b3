"""What the paper's claims about language share: 16M-parameter models, a corpus of prose and C, 25M tokens, eight seeds.

`python -m experiments.corpus` makes the corpus first: 67M tokens, 8,192 kinds of them. Flags --config.data.* name other
text. Seeds differ in their rows and initial parameters; seed s has the same rows in all variants, so that differences
are taken seed by seed. The paper's ablations have 440M parameters and 20 tokens for each, these 1.5: agreement is a
difference of the paper's sign, a third to three times as large.

`residual`, whose variants differ by rounding alone, says how uncertain these runs are: seeds have a standard deviation
of 0.017 nats and the differences of pairs of 0.012, so that the interval of eight pairs is 0.010 to either side. It
comes from copying: losses of pairs differ by 0.003 at step 100 and by 0.021 at step 700, around which models learn to
copy from far back, each seed when it does, and by 0.010 in the end. Half the learning rate learns it later: the loss is
0.015 higher, and seeds lie no closer. A variant that learns it at another time differs by more: without biases pairs
have 0.031. A variant whose difference in the paper is not several times that has a bound for an expectation.

Costs are estimates: 8 members of 16.3M parameters at 6 FLOPs a parameter and token and 20% of an H200's 989 TFLOP/s
are 2.0M tokens/s in all, 98 s a variant; about 30 s to compile it and 4 s to score 8 x 2M tokens are added. Members
that have attention run one after another, which may take longer.
"""

from mamba3_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

SEEDS = 8
LENGTH = 1024
METRIC = f"loss@{LENGTH}"
SHOWN = (METRIC,)
# Twelve narrow layers, for patterns of several mixers, have 14.9M parameters.
DEEP = {"d_model": 256, "pattern": "M" * 12, "d_ff": 768}


def config(name: str, **model) -> Config:
    """Return the config of an experiment: 1,500 steps of 16 rows of 1,024 tokens; `model` are fields of its model."""
    small = {"vocab_size": 8192, "d_model": 384, "pattern": "M" * 6, "d_ff": 1024, "compute_dtype": "bfloat16"}
    return Config(
        name=name,
        model=ModelConfig(**small | model),
        data=DataConfig(
            tokenizer="build/corpus/tokenizer.json",
            train_glob="build/corpus/train.jsonl",
            valid_glob="build/corpus/valid.jsonl",
            length=LENGTH,
            batch=16,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="wsd", warmup=0.05),
        train=TrainConfig(steps=1500, log_every=50, eval_every=0, save_every=750, keep=1),
    )
