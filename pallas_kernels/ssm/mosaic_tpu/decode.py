"""One token of the op in one Pallas Mosaic kernel for TPUs: all of the state is read once and written once, in place.

    h' = a h + sum_s w_s X_s k_s^T,   y_r = h' q_r
    o = sum_r out_rank_r norm(y_r + D X_r) silu(gate gate_rank_r)

s runs over the R ranks of the token before (w = a beta), then over those of this one (w = gamma); X_s = v_rank v. This
token's queries and keys are biased here, and turned by the angle phi' = phi + dt turn (mod 2 pi); the key of the token
before comes as it was left. What is None is left out.

A grid step has a block of heads of one row. What is a few numbers a head (angles, keys, queries, gates) is computed for
all heads of the block at once, heads on sublanes; then the state goes by, a head at a time. Both its sums, over ranks
and over N, are matrix products: they take keys and values as they lie, on lanes, and leave y on lanes, where columns of
values and sums across lanes would cost the vector unit several times what moving the state costs.

Letters: B batch, R rank, G groups of q/k, H heads (in the kernel: of the block), N state per head, P head width, S
planes; J = 2 R, the two tokens' ranks.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssm.contract import (
    NORM_EPS,
    Last,
    Stepped,
    Token,
    axes_of,
    in_place,
    map_axes,
    require,
    stepped_like,
)

TOGETHER = 8  # heads whose values and outputs change places at once: the rows of a tile
MIB = 2**20
HIGHEST = lax.Precision.HIGHEST
# Which parts of the left and right operand make up a product to float32's last bits.
LEFT, RIGHT = (0, 0, 1, 0, 2, 1), (0, 1, 0, 2, 0, 1)


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut. Performance only."""

    heads: int | None = None  # a grid step: all, or a multiple of 8 that divides them; None chooses
    unroll: int = 8  # passes over TOGETHER heads, side by side: one waits while another computes
    vmem: int = 14  # MiB that the kernel may take: every chip has 16
    interpret: object = None  # pltpu's InterpretParams: on the CPU, for tests


class Refs(NamedTuple):
    """What the kernel sees of a `Token`: ranks before heads, and what is one number a head beside each other."""

    last: Last
    q_BRGN: jax.Array
    k_BRGN: jax.Array
    v_BHP: jax.Array
    step_BKXH: jax.Array  # K blocks of heads; X: log_a, gamma, and beta and dt where there are
    angle_BHS: jax.Array | None
    start_B: jax.Array | None
    q_bias_RHN: jax.Array | None
    k_bias_RHN: jax.Array | None
    gate_BHP: jax.Array | None
    skip_HU: jax.Array | None  # U is 1
    v_rank_RHP: jax.Array | None
    gate_rank_RHP: jax.Array | None
    out_rank_RHP: jax.Array | None
    norm_HP: jax.Array | None


class Scratch(NamedTuple):
    """What the state meets on its way. I: the bfloat16 parts of a query, R each."""

    a_HN: jax.Array
    x_JHP: jax.Array  # times their weights
    k_JHN: jax.Array
    q_HIN: jax.Array
    y_HIP: jax.Array


def step(token: Token, rotation: str, *, interpret=None, tile: Tile | None = None) -> Stepped:
    """Computes a decoding step, see `contract`; for up to `STEPS` tokens one after another.

    Args:
        rotation: "adjacent", plane i is (2 i, 2 i + 1), or "half", (i, i + N / 2).
        interpret: pltpu.InterpretParams, or True.
        tile: how the kernel is cut; None chooses.

    Raises:
        ValueError: dtypes that are not float32 or bfloat16, `tile.heads` that does not divide the heads, or a block
            that takes more VMEM than `tile.vmem`.
    """
    dtypes = {array.dtype for array in (token.q_BRGN, token.k_BRGN, token.v_BHP)}
    if token.log_a_BH.dtype != jnp.float32 or not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        found = sorted(map(str, dtypes | {token.log_a_BH.dtype}))
        require("mosaic_tpu", f"wants float32 or bfloat16, not {found}")
    return _decode(token, rotation, replace(tile or Tile(), interpret=interpret))


def _decode(inputs: Token, rotation: str, tile: Tile) -> Stepped:
    n_heads = inputs.last.h_BHPN.shape[1]
    heads = tile.heads or default_heads(inputs, tile)
    if n_heads % heads or (heads != n_heads and heads % 8):
        raise ValueError(f"tile.heads={heads} is neither {n_heads=} nor a multiple of 8 that divides it")
    refs, out = _refs(inputs, heads), stepped_like(inputs)
    scratch = _scratch(inputs, heads)
    needed = vmem_bytes(refs, out, scratch, heads)
    if needed > tile.vmem * MIB:
        raise ValueError(
            f"a block of tile.heads={heads} takes {needed / MIB:.1f} MiB of VMEM, over tile.vmem={tile.vmem}"
        )
    if tile.interpret is None:
        how = {
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tile.vmem * MIB
            ),
            "cost_estimate": _cost(inputs, refs, out),
        }
    else:
        how = {"interpret": tile.interpret}
    (outputs,) = pl.pallas_call(
        functools.partial(_kernel, rotation=rotation, tile=tile),
        grid=(n_heads // heads, inputs.last.h_BHPN.shape[0]),  # rows run fastest: a head's weights stay
        in_specs=(_specs(refs, heads),),
        out_specs=[_specs(out, heads)],
        out_shape=[out],
        scratch_shapes=[Scratch(**{name: pltpu.VMEM(shape, jnp.float32) for name, shape in scratch._asdict().items()})],
        input_output_aliases=in_place(inputs.last, out.last),
        name="mamba3_decode",
        **how,
    )(refs)
    return outputs


def default_heads(inputs: Token, tile: Tile) -> int:
    """Heads of a block: as many as fit; of few rows fewer, so that moving and computing overlap over some steps."""
    batch, n_heads = inputs.last.h_BHPN.shape[:2]
    sizes = [heads for heads in range(n_heads, 0, -1) if n_heads % heads == 0 and (heads % 8 == 0 or heads == n_heads)]

    def fits(heads: int) -> bool:
        return vmem_bytes(_refs(inputs, heads), stepped_like(inputs), _scratch(inputs, heads), heads) <= tile.vmem * MIB

    fitting = [heads for heads in sizes if fits(heads)] or sizes[-1:]
    return next((heads for heads in fitting if batch * (n_heads // heads) >= 4), fitting[-1])


def vmem_bytes(refs: Refs, out: Stepped, scratch: Scratch, heads: int) -> int:
    """Of one grid step: every block twice, since the next one's is on its way, and the scratch; tiles filled up."""
    total = 0
    for path, array in jax.tree_util.tree_leaves_with_path((refs, out)):
        if (axes := axes_of(path)) != "B":
            block = _block(axes, array, heads)
            total += 2 * _tiled([size for size in block if size is not None], array.dtype.itemsize)
    return total + sum(_tiled(shape, 4) for shape in scratch)


def _tiled(shape, itemsize: int) -> int:
    *outer, rows, lanes = (1, *shape)
    up = lambda size, to: -(-size // to) * to  # noqa: E731
    return math.prod(outer) * up(rows, 32 // itemsize) * up(lanes, 128) * itemsize


def _refs(inputs: Token, heads: int) -> Refs:
    """Also of shapes."""
    abstract = isinstance(inputs.last.h_BHPN, jax.ShapeDtypeStruct)
    convert = functools.partial(_convert, heads=heads)
    return jax.eval_shape(convert, inputs) if abstract else convert(inputs)


def _convert(inputs: Token, heads: int) -> Refs:
    batch, n_heads = inputs.last.h_BHPN.shape[:2]
    numbers = (inputs.log_a_BH, inputs.gamma_BH, inputs.beta_BH, inputs.dt_BH)
    steps = jnp.stack([x_BH for x_BH in numbers if x_BH is not None], axis=1)
    step_BKXH = jnp.swapaxes(steps.reshape(batch, -1, n_heads // heads, heads), 1, 2)
    ranks_first = lambda x: None if x is None else jnp.swapaxes(x, 0, 1)  # noqa: E731
    skip_HU = None if inputs.weights.skip_H is None else inputs.weights.skip_H[:, None]
    same = {name: getattr(inputs, name) for name in Refs._fields if name in Token._fields}
    return Refs(
        **same,
        step_BKXH=step_BKXH,
        q_bias_RHN=ranks_first(inputs.weights.q_bias_HRN),
        k_bias_RHN=ranks_first(inputs.weights.k_bias_HRN),
        skip_HU=skip_HU,
        v_rank_RHP=ranks_first(inputs.weights.v_rank_HRP),
        gate_rank_RHP=ranks_first(inputs.weights.gate_rank_HRP),
        out_rank_RHP=ranks_first(inputs.weights.out_rank_HRP),
        norm_HP=inputs.weights.norm_HP,
    )


def _scratch(inputs: Token, heads: int) -> Scratch:
    (width, d_state), rank = inputs.last.h_BHPN.shape[2:], inputs.q_BRGN.shape[1]
    parts = rank * (2 if inputs.v_BHP.dtype == jnp.bfloat16 else 3)
    sources = rank if inputs.beta_BH is None else 2 * rank
    return Scratch(
        a_HN=(heads, d_state),
        x_JHP=(sources, heads, width),
        k_JHN=(sources, heads, d_state),
        q_HIN=(heads, parts, d_state),
        y_HIP=(heads, parts, width),
    )


def _block(axes: str, array, heads: int) -> tuple:
    """Returns one row and one block of heads, all of the rest; None: squeezed."""
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


def _cost(inputs: Token, refs: Refs, out: Stepped) -> pl.CostEstimate:
    (batch, n_heads, width, d_state), rank = inputs.last.h_BHPN.shape, inputs.q_BRGN.shape[1]
    return pl.CostEstimate(
        flops=2 * 3 * rank * batch * n_heads * width * d_state,
        transcendentals=2 * batch * n_heads * d_state,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((refs, out))),
    )


def _kernel(refs: Refs, out: Stepped, scratch: Scratch, *, rotation: str, tile: Tile):
    """A ref has the axes of its name but for B and K."""
    forget = None if refs.start_B is None else refs.start_B[pl.program_id(1)] != 0
    kept = lambda x: x if forget is None else jnp.where(forget, jnp.zeros_like(x), x)  # noqa: E731
    load = lambda ref, *at: ref[at or ...].astype(jnp.float32)  # noqa: E731
    heads, width, d_state = refs.last.h_BHPN.shape
    rank = refs.q_BRGN.shape[0]

    step_HX = refs.step_BKXH[...].T
    log_a_H1, gamma_H1, *more = (step_HX[:, i : i + 1] for i in range(step_HX.shape[1]))
    a_H1 = kept(jnp.exp(log_a_H1))
    scratch.a_HN[...] = jnp.broadcast_to(a_H1, (heads, d_state))

    turned = lambda x_HN: x_HN  # noqa: E731
    if refs.angle_BHS is not None:
        angle_HS = _within_a_turn(kept(refs.last.angle_BHS[...]) + more[-1] * refs.angle_BHS[...])
        out.last.angle_BHS[...] = angle_HS
        turned = _Turned(angle_HS, d_state, rotation)
    v_HP, looks_back = load(refs.v_BHP), refs.last.v_BHP is not None
    if looks_back:
        before_v_HP = a_H1 * more[0] * kept(load(refs.last.v_BHP))
        out.last.v_BHP[...] = v_HP.astype(out.last.v_BHP.dtype)

    def ranked(x_HP, ref, r: int):
        return x_HP if ref is None else x_HP * load(ref, r)

    def seen(x_ref, bias_ref, r: int):
        x_HN = jnp.broadcast_to(_per_head(load(x_ref, r), heads), (heads, d_state))
        return turned(x_HN if bias_ref is None else x_HN + load(bias_ref, r))

    own = rank if looks_back else 0  # where this token's ranks begin
    for r in range(rank):
        k_HN = seen(refs.k_BRGN, refs.k_bias_RHN, r)
        scratch.k_JHN[own + r] = k_HN
        q_HN = seen(refs.q_BRGN, refs.q_bias_RHN, r)
        for i, part_HN in enumerate(_parts(q_HN, scratch.q_HIN.shape[1] // rank)):
            scratch.q_HIN[:, i * rank + r, :] = part_HN
        scratch.x_JHP[own + r] = ranked(gamma_H1 * v_HP, refs.v_rank_RHP, r)
        if looks_back:
            out.last.k_BRHN[r] = k_HN.astype(out.last.k_BRHN.dtype)
            scratch.k_JHN[r] = kept(load(refs.last.k_BRHN, r))
            scratch.x_JHP[r] = ranked(before_v_HP, refs.v_rank_RHP, r)

    dtype = jnp.bfloat16 if tile.interpret is None else jnp.float32  # the CPU has no products of bfloat16
    together = TOGETHER if heads % TOGETHER == 0 else heads

    @pl.loop(0, heads // together, unroll=min(tile.unroll, heads // together))
    def _(group):
        _pass(refs, out, scratch, pl.ds(pl.multiple_of(group * together, together), together), kept, dtype)

    gate_HP = None if refs.gate_BHP is None else load(refs.gate_BHP)
    o_HP = jnp.zeros((heads, width), jnp.float32)
    for r in range(rank):  # SPEC section 7
        y_HP = sum(scratch.y_HIP[:, i, :] for i in range(r, scratch.y_HIP.shape[1], rank))
        if refs.skip_HU is not None:
            y_HP += load(refs.skip_HU) * ranked(v_HP, refs.v_rank_RHP, r)
        if refs.norm_HP is not None:
            y_HP *= lax.rsqrt(jnp.mean(y_HP * y_HP, axis=1, keepdims=True) + NORM_EPS) * load(refs.norm_HP)
        if gate_HP is not None:
            gated_HP = ranked(gate_HP, refs.gate_rank_RHP, r)
            y_HP *= gated_HP * jax.nn.sigmoid(gated_HP)
        o_HP += ranked(y_HP, refs.out_rank_RHP, r)
    out.o_BHP[...] = o_HP.astype(out.o_BHP.dtype)


def _pass(refs: Refs, out: Stepped, scratch: Scratch, some, kept, dtype):
    """The state of U heads, from memory and back, and what their queries read of it.

    Both sums are matrix products, since what crosses lanes is slow, of bfloat16 parts, several in one product.
    """
    rows, rank = some.size, refs.q_BRGN.shape[0]
    stacked = functools.partial(_stacked, some=some)
    x_PX, k_XN = stacked(scratch.x_JHP, LEFT).T, stacked(scratch.k_JHN, RIGHT).astype(dtype)
    owner_1X = lax.rem(_iota((1, x_PX.shape[1]), 1), rows)
    a_UN = scratch.a_HN[some, :]
    for u in range(rows):
        own_x_PX = (x_PX * (owner_1X == u).astype(jnp.float32)).astype(dtype)
        h_PN = a_UN[u : u + 1] * kept(refs.last.h_BHPN[some.start + u])
        out.last.h_BHPN[some.start + u] = h_PN + _product(own_x_PX, k_XN, 1, 0)
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
    """(6 J U, ..): the parts of some heads' rows, in an order; zeros up to whole tiles of the matrix unit."""
    parts_JU = [_parts(ref[j, some, :], 3) for j in range(ref.shape[0])]
    stacked_X = jnp.concatenate([parts[i] for i in order for parts in parts_JU])
    spare = -stacked_X.shape[0] % 128
    return jnp.concatenate([stacked_X, jnp.zeros((spare, stacked_X.shape[1]))]) if spare else stacked_X


def _parts(x, count: int):
    """float32 numbers of 8 bits each whose sum is x: to 16 bits for two, to all 24 for three."""
    found = []
    for _ in range(count - 1):
        # Veltkamp's rounding. Not by way of bfloat16: a compiler may leave out a cast there and back.
        wide = x * (2.0**16 + 1)
        found.append(wide - (wide - x))
        x = x - found[-1]
    return [*found, x]


def _product(a, b, a_axis: int, b_axis: int):
    """sum over the axes named, to float32's last bits; of bfloat16, exact products."""
    dims = (((a_axis,), (b_axis,)), ((), ()))
    precision = None if a.dtype == jnp.bfloat16 else HIGHEST
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _within_a_turn(angle):
    """In [0, 2 pi)."""
    for _ in range(2):  # a tiny negative angle rounds up to a whole turn, which is zero
        angle = angle - 2 * np.pi * jnp.floor(angle * (1 / (2 * np.pi)))
    return angle


def _per_head(x_GN, heads: int):
    """Head h reads group h // (H / G), counted over all blocks."""
    groups = x_GN.shape[0]
    if groups == 1:
        return x_GN
    a_group = pl.num_programs(0) * heads // groups
    head_HG = pl.program_id(0) * heads + _iota((heads, groups), 0)
    begin_HG = a_group * _iota((heads, groups), 1)
    mine_HG = (head_HG >= begin_HG) & (head_HG < begin_HG + a_group)
    return _product(mine_HG.astype(jnp.float32), x_GN, 1, 0)


class _Turned:
    """Queries or keys turned: an entry times the cosine, the other one of its plane times the sine."""

    def __init__(self, angle_HS, d_state: int, rotation: str):
        self.rotation, planes = rotation, angle_HS.shape[1]
        n_SN, s_SN = _iota((planes, d_state), 1), _iota((planes, d_state), 0)
        if rotation == "adjacent":
            own_SN, is_second_1N = (n_SN >> 1) == s_SN, (_iota((1, d_state), 1) & 1) == 1
        else:
            is_second_1N = _iota((1, d_state), 1) >= d_state // 2
            own_SN = (n_SN == s_SN) | (n_SN == s_SN + d_state // 2)
        # Angles onto the entries that they turn, the others zero: exact, one number and zeros.
        angle_HN = _product(angle_HS, own_SN.astype(jnp.float32), 1, 0)
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
