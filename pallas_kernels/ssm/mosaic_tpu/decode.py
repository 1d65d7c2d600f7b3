"""One token of the op in one Pallas Mosaic kernel for TPUs: all of the state is read once and written once, in place.

    phi' = phi + dt angle   (mod 2 pi),   k and q biased, and rotated by phi'
    h' = a h + sum_s w_s X_s k_s^T,   y_r = h' q_r
    o = sum_r out_rank_r norm(y_r + D X_r) silu(gate gate_rank_r)

s runs over the R ranks of the token before (w = a beta), then over those of this one (w = gamma); X_s = v_rank v. The
key of the token before comes as it was left, biased and rotated. What is None is left out.

A grid step has a block of heads of one row. What is a few numbers a head (angles, keys, queries, gates) is computed for
all heads of the block at once, heads on sublanes; then the state goes by, a head at a time. Both its sums, over ranks
and over N, are matrix products: they take keys and values as they lie, on lanes, and leave y on lanes, where columns of
values and sums across lanes would cost the vector unit several times what moving the state costs.

Letters: B batch, R rank, G groups of q/k, H heads (in the kernel: of the block), N state per head, P head width, S
rotary pairs; J = 2 R, the two tokens' ranks.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.contract import (
    NORM_EPS,
    Stepped,
    Token,
    Weights,
    axes_of,
    in_place,
    map_axes,
    require,
    stepped_like,
    wants_float32_or_bfloat16,
    wants_normed,
)
from pallas_kernels.ssm.mosaic_tpu.config import MIB, tiled_bytes

TOGETHER = 8  # heads whose values and outputs change places at once: the rows of a tile
HIGHEST = lax.Precision.HIGHEST
# Which parts of the left and right operand make up a product to float32's last bits.
LEFT, RIGHT = (0, 0, 1, 0, 2, 1), (0, 1, 0, 2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernel is cut. Performance only."""

    heads: int | None = None  # of a grid step: all, or a multiple of 8 that divides them; None chooses
    unroll: int = 8  # passes over TOGETHER heads, side by side: one waits while another computes
    vmem: int = 14  # MiB that the kernel may take: every chip has 16
    interpret: object = None  # pltpu's InterpretParams: on the CPU, for tests


class RankedWeights(NamedTuple):
    """`Weights` as the kernel sees them, ranks before heads."""

    q_bias_RHN: jax.Array | None
    k_bias_RHN: jax.Array | None
    skip_HU: jax.Array | None  # U is 1
    v_rank_RHP: jax.Array | None
    gate_rank_RHP: jax.Array | None
    out_rank_RHP: jax.Array | None
    norm_HP: jax.Array | None


class StepOperands(NamedTuple):
    """A `Token` as the kernel sees it; the state comes first, see `contract.in_place`."""

    token: Token  # without its numbers, `start` and weights
    numbers_BKXH: jax.Array  # K blocks of heads; X: log_a, gamma, and beta and dt where there are
    start_B: jax.Array | None
    weights: RankedWeights


class StepScratch(NamedTuple):
    """What the state meets on its way. I: the bfloat16 parts of a query, R each."""

    a_HN: jax.Array
    x_JHP: jax.Array  # times their weights
    k_JHN: jax.Array
    q_HIN: jax.Array
    y_HIP: jax.Array


def step(token: Token, rotation: str, *, interpret=None, tile: Tile | None = None) -> Stepped:
    """Compute a decoding step, see `contract`; for up to `STEPS` tokens one after another.

    Args:
        rotation: "adjacent", pair i is (2 i, 2 i + 1), or "half", (i, i + N / 2).
        interpret: pltpu.InterpretParams, or True.
        tile: how the kernel is cut; None chooses.

    Raises:
        ValueError: dtypes that are not float32 or bfloat16, `tile.heads` that does not divide the heads, or a block
            that takes more VMEM than `tile.vmem`.
    """
    require("mosaic_tpu", wants_float32_or_bfloat16(token) or wants_normed(token))
    tile = dataclasses.replace(tile or Tile(), interpret=interpret)
    batch, n_heads = token.last.h_BHPN.shape[:2]
    heads = tile.heads or default_heads(token, tile)
    if n_heads % heads or (heads != n_heads and heads % 8):
        raise ValueError(f"tile.heads={heads} is neither {n_heads=} nor a multiple of 8 that divides it")
    needed = vmem_bytes(token, heads)
    if needed > tile.vmem * MIB:
        raise ValueError(
            f"a block of tile.heads={heads} takes {needed / MIB:.1f} MiB of VMEM, over tile.vmem={tile.vmem}"
        )
    operands, out = _operands(token, heads), stepped_like(token)
    how = {"interpret": tile.interpret}
    if tile.interpret is None:
        semantics, limit = ("parallel", "parallel"), tile.vmem * MIB
        params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=limit)
        how = {"compiler_params": params, "cost_estimate": _cost(token, operands, out)}
    (stepped,) = pl.pallas_call(
        functools.partial(_kernel, rotation=rotation, tile=tile),
        grid=(n_heads // heads, batch),  # rows run fastest: a head's weights stay
        in_specs=(_specs(operands, heads),),
        out_specs=[_specs(out, heads)],
        out_shape=[out],
        scratch_shapes=[_scratch(token, heads)],
        input_output_aliases=in_place(token.last, out.last),
        name="mamba3_decode",
        **how,
    )(operands)
    return stepped


def default_heads(token: Token, tile: Tile) -> int:
    """Choose the heads of a block: as many as fit; of few rows fewer, so that moving and computing overlap."""
    batch, n_heads = token.last.h_BHPN.shape[:2]
    sizes = [heads for heads in range(n_heads, 0, -1) if n_heads % heads == 0 and (heads % 8 == 0 or heads == n_heads)]
    fitting = [heads for heads in sizes if vmem_bytes(token, heads) <= tile.vmem * MIB] or sizes[-1:]
    return next((heads for heads in fitting if batch * (n_heads // heads) >= 4), fitting[-1])


def vmem_bytes(token: Token, heads: int) -> int:
    """Return those of a grid step: every block twice, since the next one's is on its way, and the scratch."""
    operands = jax.eval_shape(functools.partial(_operands, heads=heads), token)
    total = sum(tiled_bytes(buffer.shape, buffer.dtype) for buffer in _scratch(token, heads))
    for path, array in jax.tree_util.tree_leaves_with_path((operands, stepped_like(token))):
        if (axes := axes_of(path)) != "B":
            total += 2 * tiled_bytes(_block(axes, array, heads), array.dtype)
    return total


def _operands(token: Token, heads: int) -> StepOperands:
    batch, n_heads = token.last.h_BHPN.shape[:2]
    numbers = (token.log_a_BH, token.gamma_BH, token.beta_BH, token.dt_BH)
    numbers_BXH = jnp.stack([x_BH for x_BH in numbers if x_BH is not None], axis=1)
    elsewhere = ("dt_BH", "log_a_BH", "gamma_BH", "beta_BH", "start_B", "weights")
    return StepOperands(
        token=token._replace(**dict.fromkeys(elsewhere)),
        numbers_BKXH=jnp.swapaxes(numbers_BXH.reshape(batch, -1, n_heads // heads, heads), 1, 2),
        start_B=token.start_B,
        weights=_ranks_first(token.weights),
    )


def _ranks_first(weights: Weights) -> RankedWeights:
    first = lambda x: None if x is None else jnp.swapaxes(x, 0, 1)  # noqa: E731
    return RankedWeights(
        q_bias_RHN=first(weights.q_bias_HRN),
        k_bias_RHN=first(weights.k_bias_HRN),
        skip_HU=None if weights.skip_H is None else weights.skip_H[:, None],
        v_rank_RHP=first(weights.v_rank_HRP),
        gate_rank_RHP=first(weights.gate_rank_HRP),
        out_rank_RHP=first(weights.out_rank_HRP),
        norm_HP=weights.norm_HP,
    )


def _scratch(token: Token, heads: int) -> StepScratch:
    (width, d_state), rank = token.last.h_BHPN.shape[2:], token.q_BRGN.shape[1]
    parts = rank * (2 if token.v_BHP.dtype == jnp.bfloat16 else 3)
    sources = rank if token.beta_BH is None else 2 * rank
    vmem = lambda *shape: pltpu.VMEM(shape, jnp.float32)  # noqa: E731
    return StepScratch(
        a_HN=vmem(heads, d_state),
        x_JHP=vmem(sources, heads, width),
        k_JHN=vmem(sources, heads, d_state),
        q_HIN=vmem(heads, parts, d_state),
        y_HIP=vmem(heads, parts, width),
    )


def _block(axes: str, array, heads: int) -> tuple:
    """Return the block of one row and one block of heads, with all of the rest; None: squeezed."""
    sizes = {"B": None, "K": None, "H": heads}
    named = zip(axes, array.shape, strict=True)
    return tuple(sizes.get(axis, size) if size > 1 or axis in "BK" else size for axis, size in named)


def _specs(tree, heads: int):
    def spec(axes: str, array):
        if axes == "B":
            return pl.BlockSpec(memory_space=pltpu.SMEM)

        def index(block_of_heads, row):
            at = {"B": row, "K": block_of_heads, "H": 0 if "K" in axes else block_of_heads}
            return tuple(at.get(axis, 0) if size > 1 else 0 for axis, size in zip(axes, array.shape, strict=True))

        return pl.BlockSpec(_block(axes, array, heads), index)

    return map_axes(spec, tree)


def _cost(token: Token, operands: StepOperands, out: Stepped) -> pl.CostEstimate:
    (batch, n_heads, width, d_state), rank = token.last.h_BHPN.shape, token.q_BRGN.shape[1]
    return pl.CostEstimate(
        flops=2 * 3 * rank * batch * n_heads * width * d_state,
        transcendentals=2 * batch * n_heads * d_state,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, out))),
    )


def _kernel(refs: StepOperands, out: Stepped, scratch: StepScratch, *, rotation: str, tile: Tile):
    """Compute a block of heads of one row; a ref has the axes of its name but for B and K."""
    starts = None if refs.start_B is None else refs.start_B[pl.program_id(1)] != 0
    unless_start = lambda x: x if starts is None else jnp.where(starts, jnp.zeros_like(x), x)  # noqa: E731
    load = lambda ref, *at: ref[at or ...].astype(jnp.float32)  # noqa: E731
    token = refs.token
    (heads, width, d_state), weights = token.last.h_BHPN.shape, refs.weights
    rank, looks_back, rotates = (
        token.q_BRGN.shape[0],
        token.last.v_BHP is not None,
        token.angle_BHS is not None,
    )

    names = ["log_a", "gamma", *["beta"] * looks_back, *["dt"] * rotates]
    numbers_HX = refs.numbers_BKXH[...].T
    number_H1 = {name: numbers_HX[:, x : x + 1] for x, name in enumerate(names)}
    a_H1 = unless_start(jnp.exp(number_H1["log_a"]))
    scratch.a_HN[...] = jnp.broadcast_to(a_H1, (heads, d_state))

    rotated = lambda x_HN: x_HN  # noqa: E731
    if rotates:
        angle_HS = _within_a_turn(unless_start(token.last.angle_BHS[...]) + number_H1["dt"] * token.angle_BHS[...])
        out.last.angle_BHS[...] = angle_HS
        rotated = _Rotation(angle_HS, d_state, rotation)
    v_HP = load(token.v_BHP)
    if looks_back:
        before_v_HP = a_H1 * number_H1["beta"] * unless_start(load(token.last.v_BHP))
        out.last.v_BHP[...] = v_HP.astype(out.last.v_BHP.dtype)

    def ranked(x_HP, ref, r: int):
        return x_HP if ref is None else x_HP * load(ref, r)

    def seen_by_heads(x_ref, bias_ref, r: int):
        x_HN = jnp.broadcast_to(_per_head(load(x_ref, r), heads), (heads, d_state))
        return rotated(x_HN if bias_ref is None else x_HN + load(bias_ref, r))

    first = rank if looks_back else 0  # where this token's ranks begin
    for r in range(rank):
        k_HN = seen_by_heads(token.k_BRGN, weights.k_bias_RHN, r)
        scratch.k_JHN[first + r] = k_HN
        q_HN = seen_by_heads(token.q_BRGN, weights.q_bias_RHN, r)
        for i, part_HN in enumerate(_parts(q_HN, scratch.q_HIN.shape[1] // rank)):
            scratch.q_HIN[:, i * rank + r, :] = part_HN
        scratch.x_JHP[first + r] = ranked(number_H1["gamma"] * v_HP, weights.v_rank_RHP, r)
        if looks_back:
            out.last.k_BRHN[r] = k_HN.astype(out.last.k_BRHN.dtype)
            scratch.k_JHN[r] = unless_start(load(token.last.k_BRHN, r))
            scratch.x_JHP[r] = ranked(before_v_HP, weights.v_rank_RHP, r)

    dtype = jnp.bfloat16 if tile.interpret is None else jnp.float32  # the CPU has no products of bfloat16
    together = TOGETHER if heads % TOGETHER == 0 else heads

    @pl.loop(0, heads // together, unroll=min(tile.unroll, heads // together))
    def _(group):
        some = pl.ds(pl.multiple_of(group * together, together), together)
        _pass(refs, out, scratch, some=some, unless_start=unless_start, dtype=dtype)

    gate_HP = None if token.gate_BHP is None else load(token.gate_BHP)
    o_HP = jnp.zeros((heads, width), jnp.float32)
    for r in range(rank):  # the epilogue
        y_HP = sum(scratch.y_HIP[:, i, :] for i in range(r, scratch.y_HIP.shape[1], rank))
        if weights.skip_HU is not None:
            y_HP += load(weights.skip_HU) * ranked(v_HP, weights.v_rank_RHP, r)
        if weights.norm_HP is not None:
            y_HP *= lax.rsqrt(jnp.mean(y_HP * y_HP, axis=1, keepdims=True) + NORM_EPS) * load(weights.norm_HP)
        if gate_HP is not None:
            gated_HP = ranked(gate_HP, weights.gate_rank_RHP, r)
            y_HP *= gated_HP * jax.nn.sigmoid(gated_HP)
        o_HP += ranked(y_HP, weights.out_rank_RHP, r)
    out.o_BHP[...] = o_HP.astype(out.o_BHP.dtype)


def _pass(refs: StepOperands, out: Stepped, scratch: StepScratch, *, some, unless_start, dtype):
    """Take the state of U heads from memory and back, and store what their queries read of it.

    Both sums are matrix products, since what crosses lanes is slow, of bfloat16 parts, several in one product.
    """
    rows, rank = some.size, refs.token.q_BRGN.shape[0]
    stacked = functools.partial(_stacked, some=some)
    x_PX, k_XN = stacked(scratch.x_JHP, LEFT).T, stacked(scratch.k_JHN, RIGHT).astype(dtype)
    head_1X = lax.rem(_iota((1, x_PX.shape[1]), 1), rows)
    a_UN = scratch.a_HN[some, :]
    for u in range(rows):
        of_head_PX = (x_PX * (head_1X == u).astype(jnp.float32)).astype(dtype)
        h_PN = a_UN[u : u + 1] * unless_start(refs.token.last.h_BHPN[some.start + u])
        out.last.h_BHPN[some.start + u] = h_PN + _product(of_head_PX, k_XN, 1, 0)
    for u in range(rows):
        head = some.start + u
        q_IN = scratch.q_HIN[head].astype(dtype)
        parts = q_IN.shape[0] // rank
        part_I1 = _iota((q_IN.shape[0], 1), 0)
        y_IP = 0.0
        for i, h_PN in enumerate(_parts(out.last.h_BHPN[head], parts)):
            read_IP = _product(q_IN, h_PN.astype(dtype), 1, 1)
            y_IP += read_IP if i == 0 else jnp.where(part_I1 < (parts - i) * rank, read_IP, 0.0)
        scratch.y_HIP[head] = y_IP


def _stacked(ref, order, *, some):
    """Return the parts of some heads' rows, in an order, (6 J U, ..), with zeros up to tiles of the matrix unit."""
    parts_JU = [_parts(ref[j, some, :], 3) for j in range(ref.shape[0])]
    stacked_X = jnp.concatenate([parts[i] for i in order for parts in parts_JU])
    padding = -stacked_X.shape[0] % 128
    return jnp.concatenate([stacked_X, jnp.zeros((padding, stacked_X.shape[1]))]) if padding else stacked_X


def _parts(x, count: int):
    """Return float32 numbers of 8 bits each whose sum is x: to 16 bits for two, to all 24 for three."""
    found = []
    for _ in range(count - 1):
        # Veltkamp's rounding. Not by way of bfloat16: a compiler may leave out a cast to it and back.
        scaled = x * (2.0**16 + 1)
        found.append(scaled - (scaled - x))
        x = x - found[-1]
    return [*found, x]


def _product(a, b, a_axis: int, b_axis: int):
    """Return the sum over the axes named, to float32's last bits; products of bfloat16 are exact."""
    dims = (((a_axis,), (b_axis,)), ((), ()))
    precision = None if a.dtype == jnp.bfloat16 else HIGHEST
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _within_a_turn(angle):
    """Return the angle in [0, 2 pi)."""
    for _ in range(2):  # a tiny negative angle rounds up to a whole turn, which is zero
        angle = angle - 2 * np.pi * jnp.floor(angle * (1 / (2 * np.pi)))
    return angle


def _per_head(x_GN, heads: int):
    """Give head h its group h // (H / G), counted over all blocks."""
    groups = x_GN.shape[0]
    if groups == 1:
        return x_GN
    a_group = pl.num_programs(0) * heads // groups
    head_HG = pl.program_id(0) * heads + _iota((heads, groups), 0)
    begin_HG = a_group * _iota((heads, groups), 1)
    reads_HG = (head_HG >= begin_HG) & (head_HG < begin_HG + a_group)
    return _product(reads_HG.astype(jnp.float32), x_GN, 1, 0)


class _Rotation:
    """Rotates queries or keys: an entry times the cosine, the other one of its pair times the sine."""

    def __init__(self, angle_HS, d_state: int, rotation: str):
        self.rotation, pairs = rotation, angle_HS.shape[1]
        n_SN, s_SN = _iota((pairs, d_state), 1), _iota((pairs, d_state), 0)
        if rotation == "adjacent":
            pair_SN, is_second_1N = (n_SN >> 1) == s_SN, (_iota((1, d_state), 1) & 1) == 1
        else:
            is_second_1N = _iota((1, d_state), 1) >= d_state // 2
            pair_SN = (n_SN == s_SN) | (n_SN == s_SN + d_state // 2)
        # This product copies angles to the entries that they rotate: exact, since it adds zeros to one number.
        angle_HN = _product(angle_HS, pair_SN.astype(jnp.float32), 1, 0)
        self.cos_HN, sin_HN = jnp.cos(angle_HN), jnp.sin(angle_HN)
        self.sin_HN, self.is_second_1N = jnp.where(is_second_1N, sin_HN, -sin_HN), is_second_1N

    def __call__(self, x_HN):
        d_state = x_HN.shape[1]
        if self.rotation == "adjacent":
            other_HN = jnp.where(self.is_second_1N, pltpu.roll(x_HN, 1, 1), pltpu.roll(x_HN, d_state - 1, 1))
        else:
            other_HN = pltpu.roll(x_HN, d_state // 2, 1)
        return x_HN * self.cos_HN + other_HN * self.sin_HN


def _iota(shape, axis: int):
    return lax.broadcasted_iota(jnp.int32, shape, axis)
