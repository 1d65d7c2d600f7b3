"""How much attention does a hybrid want, and does the norm before the gate matter (tables 4 and 9 of the paper)?

    python -m launch.sweep --config=experiments/ablations/hybrid.py --workdir=runs/hybrid

Cost: 20 minutes on one H200, estimated: 9 variants of 8 seeds, 90 s each, and what is compiled. Twelve layers, 14.9M
parameters each, by d_ff. Attention in hybrids has no positions, alone it has RoPE. The paper's hybrids are 5:1 at 1.5B,
of which it reports downstream tasks alone: by those a hybrid is no worse than Mamba-3, and without the norm it fails to
retrieve past the trained length. Expect hybrids 0.0 to 0.1 nats better than Mamba-3 at the trained length, and the norm
to matter there by at most 0.01; late_loss@4096 shows what happens past it.
"""

from experiments.ablations import language
from mamba3_jax.config import Config

NORM = {"model.out_norm": True}
HYBRIDS = {
    "hybrid_5_1": {"model.pattern": "MMMMMA" * 2, "model.d_ff": 816},
    "hybrid_3_1": {"model.pattern": "MMMA" * 3, "model.d_ff": 840},
    "hybrid_1_1": {"model.pattern": "MA" * 6, "model.d_ff": 904},
}
VARIANTS = {
    "mamba3": {},
    "mamba3_norm": NORM,
    **{name + norm: fields | more for name, fields in HYBRIDS.items() for norm, more in (("", {}), ("_norm", NORM))},
    "transformer": {"model.pattern": "A" * 12, "model.attn_rope_theta": 10000.0, "model.d_ff": 1048},
}
SEEDS, METRIC, LENGTHS = language.SEEDS, language.METRIC, (1024, 4096)
SHOWN = ("loss@1024", "late_loss@1024", "late_loss@4096")
EXPECT = {
    "mamba3_norm": ("difference loss@1024", -0.015, 0.015),
    **dict.fromkeys(HYBRIDS, ("difference loss@1024", -0.100, 0.0)),
    **{f"{name}_norm": ("difference loss@1024", -0.110, 0.010) for name in HYBRIDS},
    "transformer": ("difference loss@1024", -0.050, 0.100),
}


def get_config() -> Config:
    return language.config("hybrid", **language.DEEP)
