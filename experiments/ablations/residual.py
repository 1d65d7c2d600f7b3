"""What does a residual stream in bfloat16 cost in loss?

    python -m launch.sweep --config=experiments/ablations/residual.py --workdir=runs/residual

Cost: 4 minutes on one H200, estimated: 2 variants of 8 seeds, 98 s each, and what is compiled. Six layers add up to
thirteen numbers in the stream, each rounded to 8 bits, while products round their operands so in both variants. Expect
no difference that eight seeds can tell: at most 0.004 nats.
"""

from experiments.ablations import language
from mamba3_jax.config import Config

VARIANTS = {"float32": {}, "bfloat16": {"model.residual_in_fp32": False}}
SEEDS, METRIC, SHOWN = language.SEEDS, language.METRIC, language.SHOWN
EXPECT = {"bfloat16": ("difference loss@1024", -0.004, 0.004)}


def get_config() -> Config:
    return language.config("residual")
