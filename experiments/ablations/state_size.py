"""How much state does each model need for a loss, and what does a token of decoding then cost (figure 3 of the paper)?

    python -m launch.sweep --config=experiments/ablations/state_size.py --workdir=runs/state_size

Cost: 35 minutes on one H200, estimated: 13 variants of 8 seeds, 98 s each, MIMO 190 s, and what is compiled. Another 10
for the times and states that loss is drawn against, by the last command in experiments/benchmarks/decode.py. All models
have 16.3M parameters, by d_ff. Expect by the paper's figure: SISO at 60 and MIMO at 16 or less have the loss of Mamba-2
at 128, MIMO at 30 that of SISO at 128; beside Mamba-2 at 128, SISO at 128 is 0.009 nats better, MIMO 0.023, and Mamba-2
at 16 is 0.031 worse.
"""

from experiments.ablations import language
from mamba3_jax.config import Config

MIXERS = {
    "mamba2": {"model.pattern": "2" * 6},
    "siso": {},
    "mimo": {"model.mimo_rank": 4},
}
D_FF = {  # by d_state, for equal parameters
    "mamba2": {128: 1040, 64: 1080, 32: 1104, 16: 1120},
    "siso": {128: 1024, 64: 1072, 32: 1096, 16: 1112},
    "mimo": {128: 752, 64: 936, 32: 1024, 16: 1072},
}
VARIANTS = {
    f"{mixer}_{size}": MIXERS[mixer] | {"model.d_state": size, "model.d_ff": d_ff}
    for mixer, widths in D_FF.items()
    for size, d_ff in widths.items()
} | {"transformer": {"model.pattern": "A" * 6, "model.attn_rope_theta": 10000.0, "model.d_ff": 1392}}
SEEDS, METRIC, SHOWN = language.SEEDS, language.METRIC, language.SHOWN
NAMES = {"mamba2": "Mamba-2", "siso": "Mamba-3 SISO", "mimo": "Mamba-3 MIMO, R 4"}
SIZE = "d_state"
SIZES = {name: {f"{mixer}_{size}": size for size in sorted(D_FF[mixer])} for mixer, name in NAMES.items()}
EQUAL = [(NAMES["siso"], "mamba2_128"), (NAMES["mimo"], "mamba2_128"), (NAMES["mimo"], "siso_128")]
DECODE = "decode_state_size"
EXPECT = {
    "mamba2_16": ("difference loss@1024", 0.010, 0.092),
    "siso_128": ("difference loss@1024", -0.027, -0.003),
    "siso_64": ("difference loss@1024", -0.015, 0.015),
    "siso_16": ("difference loss@1024", 0.009, 0.080),
    "mimo_128": ("difference loss@1024", -0.070, -0.008),
    "mimo_16": ("difference loss@1024", -0.015, 0.015),
}
PAPER = {
    "mamba2_16": 15.18,
    "mamba2_32": 15.02,
    "mamba2_64": 14.87,
    "mamba2_128": 14.72,
    "siso_16": 15.12,
    "siso_32": 14.81,
    "siso_64": 14.71,
    "siso_128": 14.59,
    "mimo_16": 14.71,
    "mimo_32": 14.58,
    "mimo_64": 14.43,
    "mimo_128": 14.38,
}


def get_config() -> Config:
    return language.config("state_size")
