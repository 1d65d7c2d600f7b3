"""The sizes of a call of the op, and which inputs it has: the one place of shapes for tests, benchmarks and the tuner.

The arrays are drawn where their containers are known: tests/ops/cases.py, experiments/benchmarks/ssm.py.
"""

from typing import NamedTuple


class Case(NamedTuple):
    """The sizes of one call, and which of its inputs are not None; the letters are those of `contract`."""

    batch: int = 2
    length: int = 13
    heads: int = 4
    groups: int = 2
    rank: int = 1
    d_state: int = 8
    width: int = 4
    planes: int = 2
    rotation: str = "adjacent"
    shared_angle: bool = True
    skip: bool = True
    gate: bool = True
    norm: bool = False
    ranked: bool = False  # v_rank and out_rank; with rank > 1 they are always there
    gate_ranked: bool = False
    bias: bool = True
    biased: str = "kq"  # with `bias`, which of k and q have one: k, q or kq
    looks_back: bool = True  # beta, and the state's k and v
    turns: bool = True  # angle, dt, and the state's angle
    dtype: str = "float32"  # of q, k, v and gate
    mixer: str = "mamba3"  # whose layer makes this call: mamba3 | mamba2

    def sizes(self) -> dict:
        """Return the arguments of `of_layer`, which result files record."""
        names = ("batch", "length", "heads", "width", "d_state", "groups", "rank", "dtype")
        return {name: getattr(self, name) for name in (*names, *(["mixer"] if self.mixer != "mamba3" else []))}

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of an array, by the letters of its name, such as `q_BLRGN`; None: this call has none."""
        there = {
            **dict.fromkeys(("dt_BLH", "angle_BLHS", "angle_BHS"), self.turns),
            **dict.fromkeys(("beta_BLH", "k_BRHN", "v_BHP"), self.looks_back),
            "q_bias_HRN": self.bias and "q" in self.biased,
            "k_bias_HRN": self.bias and "k" in self.biased,
            **dict.fromkeys(("v_rank_HRP", "out_rank_HRP"), self.ranked or self.rank > 1),
            "gate_BLHP": self.gate,
            "gate_rank_HRP": self.gate and self.gate_ranked,
            "skip_H": self.skip,
            "norm_HP": self.norm,
        }
        if not there.get(name, True):
            return None
        letters = {"B": self.batch, "L": self.length, "H": self.heads, "G": self.groups, "R": self.rank}
        letters |= {"N": self.d_state, "P": self.width, "S": self.planes}
        if name == "angle_BLHS" and self.shared_angle:
            letters["H"] = 1
        return tuple(letters[letter] for letter in name.rsplit("_", 1)[1])


# What each mixer's layer leaves out of the call.
LEFT_OUT_BY = {"mamba3": {}, "mamba2": dict.fromkeys(("gate", "bias", "looks_back", "turns"), False)}


def of_layer(*, batch, length, heads, width, d_state, groups=1, rank=1, dtype="float32", mixer: str = "mamba3") -> Case:
    """Return the call that a layer makes by default: with a gate and a skip, without a norm, half of the state rotated.

    Mamba-2's layer passes the skip alone: its gate and norm come after the op.
    """
    sizes = {"batch": batch, "length": length, "heads": heads, "width": width, "d_state": d_state, "groups": groups}
    rotation = "adjacent" if rank == 1 else "half"
    case = Case(**sizes, rank=rank, planes=d_state // 4, rotation=rotation, gate_ranked=rank > 1, dtype=dtype)
    return case._replace(mixer=mixer, **LEFT_OUT_BY[mixer])


def varied(case: Case, **sizes) -> Case:
    """Return the layer's call with other sizes, and with what follows from them."""
    return of_layer(**case.sizes() | sizes)


SISO = Case()
MIMO = Case(
    rank=4, groups=1, rotation="half", shared_angle=False, norm=True, ranked=True, gate_ranked=True, planes=4, heads=2
)
# Calls without some of the inputs; without any of them, it is Mamba-2's SSD.
SSD = SISO._replace(gate=False, skip=False, bias=False, looks_back=False, turns=False)
LEFT_OUT = {
    "ssd": SSD,
    "ssd_in_ranks": SSD._replace(rank=2, ranked=True),
    "no_rotation": SISO._replace(turns=False, biased="q"),
    "first_order": MIMO._replace(rank=2, looks_back=False, biased="k"),
    "no_bias": SISO._replace(bias=False, rotation="half", shared_angle=False),
}
