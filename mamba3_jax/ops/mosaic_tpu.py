"""The op in Pallas Mosaic for TPUs: bias, rotation, scan, norm and gate in one kernel, one more backward."""

import dataclasses

import jax
import jax.numpy as jnp

from mamba3_jax.ops.chunks import documents, incoming, last_state
from mamba3_jax.ops.discretize import later_weight
from mamba3_jax.ops.rotary import to_planes
from mamba3_jax.ops.types import Heads, State, Tokens, product_dtype

LANES = 128
RANKS = (1, 2, 4, 8)


def mosaic_tpu(
    tokens: Tokens,
    heads: Heads,
    state: State | None,
    *,
    rotation: str,
    chunk: int | None = None,
    tiles=None,
    interpret: object = None,
):
    """The sums of `chunked` in one fused kernel, `pallas_kernels.ssm.mosaic_tpu`.

    Queries and keys are biased and turned inside the kernel: they are read once a chunk for all heads of a group, and
    nothing of size L H N is ever stored. The backward pass keeps the inputs and the state before every chunk.

    Args:
        chunk: tokens a chunk, rounded up to a multiple of 16; None: the tiles'. Performance only.
        tiles: `pallas_kernels.ssm.mosaic_tpu.contract.Tiles`; None: those of this process's TPU.
        interpret: pltpu.InterpretParams: run the kernels' program on any backend, slowly, for tests.

    Raises:
        ValueError: no TPU, float64, a rank other than 1, 2, 4 or 8, d_state over 256, P over 128, or tiles that do not
            fit in VMEM.
    """
    # Here, since everything else works without the kernels.
    from pallas_kernels.ssm.mosaic_tpu import op

    check(tokens, interpret, tiles)
    tiles = tiles_of(tokens, chunk, tiles, interpret)
    length, n_heads, width = tokens.v_BLHP.shape[1:]
    d_state = tokens.q_BLRGN.shape[-1]
    planes = 0 if tokens.angle_BLHS is None else tokens.angle_BLHS.shape[-1]
    padding = -length % tiles.tokens
    spare = padded_width(n_heads, width, tiles.heads) - width
    layout = Layout(d_state, planes, rotation)
    dtype = product_dtype(tokens)

    def padded(array_BL):
        """Zeros after the end: gamma = 0 and log_a = 0 leave the state as it is."""
        if array_BL is None or not padding:
            return array_BL
        return jnp.pad(array_BL, [(0, 0), (0, padding), *[(0, 0)] * (array_BL.ndim - 2)])

    wide = lambda array_P: _last_padded(array_P, spare)  # noqa: E731
    float32 = lambda array: None if array is None else array.astype(jnp.float32)  # noqa: E731
    narrow = lambda array: None if array is None else padded(array.astype(dtype))  # noqa: E731
    by_group = lambda x_BLRGN: jnp.swapaxes(layout.wide(narrow(x_BLRGN)), 2, 3)  # noqa: E731
    kappa_BLH, first_BH = later_weight(tokens.gamma_BLH, tokens.beta_BLH, tokens.start_BL)
    start_BL = padded(tokens.start_BL)
    document_BL = None
    if start_BL is not None:
        _, document_EQ = documents(start_BL.reshape(-1, tiles.tokens), tiles.tokens)
        document_BL = document_EQ.reshape(start_BL.shape)
    more_planes = max(-(-planes // 8), 1) * 8 - planes
    first_BHS = h_BHPN = None
    if state is not None:
        first_BHS = _last_padded(state.angle_BHS, more_planes)
        h_BHPN = layout.wide(incoming(state, first_BH, heads))
        h_BHPN = jnp.pad(h_BHPN, [(0, 0), (0, 0), (0, spare), (0, 0)])
    skip_HP = None if heads.skip_H is None else jnp.broadcast_to(heads.skip_H[:, None], (n_heads, width + spare))
    inputs = op.Inputs(
        by_group(tokens.q_BLRGN),
        by_group(tokens.k_BLRGN),
        wide(narrow(tokens.v_BLHP)),
        wide(narrow(tokens.gate_BLHP)),
        _last_padded(padded(tokens.angle_BLHS), more_planes),
        padded(tokens.dt_BLH) if planes else None,
        padded(tokens.log_a_BLH),
        padded(tokens.gamma_BLH),
        padded(kappa_BLH),
        first_BHS,
        h_BHPN,
        *(float32(layout.to(bias_HRN)) for bias_HRN in (heads.q_bias_HRN, heads.k_bias_HRN)),
        float32(skip_HP),
        *(float32(wide(x)) for x in (heads.v_rank_HRP, heads.gate_rank_HRP, heads.out_rank_HRP, heads.norm_HP)),
    )
    order_MN = None if layout.same else layout.order_NM.T.astype(dtype)
    y_BLHP, h_BHPN, angle_BHS, k_BGRN, v_BHP = op.mamba3(inputs, document_BL, order_MN, length - 1, tiles)
    y_BLHP = y_BLHP[:, :length, :, :width].astype(tokens.v_BLHP.dtype)
    h_BHPN = h_BHPN[:, :, :width, :d_state]
    k_BRGN = jnp.swapaxes(k_BGRN[..., :d_state], 1, 2).astype(tokens.k_BLRGN.dtype)
    v_BHP = v_BHP[..., :width].astype(tokens.v_BLHP.dtype)
    last = tokens._replace(k_BLRGN=k_BRGN[:, None], v_BLHP=v_BHP[:, None])
    angle_BHS = None if angle_BHS is None else angle_BHS[..., :planes]
    return y_BLHP, last_state(last, heads, angle_BHS, h_BHPN, rotation)


class Layout:
    """Where the kernel keeps the entries of a state: plane i at (i, i + N/2), in between what does not turn.

    N is a multiple of 128 there. Products of queries and keys do not see the order.
    """

    def __init__(self, d_state: int, planes: int, rotation: str):
        self.planes, self.rest, self.rotation = planes, d_state - 2 * planes, rotation
        self.size = -(-d_state // LANES) * LANES
        self.half = self.size // 2
        self.same = not planes or (rotation == "half" and self.size == d_state)  # what does not turn lies anywhere
        self.order_NM = (
            None if self.same else self._order(d_state)
        )  # (N of the kernel, twice): a one where an entry goes

    def _order(self, d_state: int):
        first_rest = min(self.rest, self.half - self.planes)
        ends = (self.planes, 2 * self.planes, 2 * self.planes + first_rest)
        in_planes_NN = to_planes(jnp.eye(d_state), self.planes, self.rotation)
        first, second, more, rest = jnp.split(in_planes_NN, ends, axis=-1)
        halves = (jnp.concatenate(pair, axis=-1) for pair in ((first, more), (second, rest)))
        order_NM = jnp.concatenate([_last_padded(x, self.half - x.shape[-1]) for x in halves], axis=-1)
        return jnp.pad(order_NM, [(0, self.size - d_state), (0, 0)])

    def wide(self, array_N):
        """In the op's order, as many as the kernel's."""
        return _last_padded(array_N, self.size - array_N.shape[-1])

    def to(self, array_N):
        """In the kernel's order, zeros in between. Exact: TPUs move lanes slowly, but multiply matrices in no time."""
        if array_N is None or self.same:
            return None if array_N is None else self.wide(array_N)
        return jnp.matmul(self.wide(array_N), self.order_NM.astype(array_N.dtype), precision="highest")


def tiles_of(tokens: Tokens, chunk: int | None, tiles, interpret):
    """What is not given, by the chip; never more tokens than there are."""
    from pallas_kernels.ssm.mosaic_tpu.tiles import block, default, this_chip

    n_heads, width = tokens.v_BLHP.shape[2:]
    rank, groups, _ = tokens.q_BLRGN.shape[2:]
    shape = (n_heads, groups, width)
    if tiles is None:
        chip = "v5e" if interpret is not None else this_chip()
        tiles = default(chip, rank, *shape, dtype=product_dtype(tokens))
    heads = block(*shape) if tiles.heads is None else tiles.heads
    most = min(chunk or tiles.tokens, tokens.log_a_BLH.shape[1])
    return dataclasses.replace(tiles, tokens=-(-most // 16) * 16, heads=heads, width=width, interpret=interpret)


def padded_width(n_heads: int, width: int, heads: int) -> int:
    """P in the kernel: a block of heads fills its lanes, or, where it has all of them, a state whole tiles of rows."""
    unit = 8 if heads == n_heads else LANES // heads
    return -(-width // unit) * unit


def check(tokens: Tokens, interpret=None, tiles=None) -> None:
    """Raise ValueError, naming it, for what the kernels do not support."""
    # Tiles name a chip to compile for, whatever this process has.
    wish = (needs() if interpret is None and tiles is None else None) or unsupported(tokens)
    if wish is not None:
        raise ValueError(f"implementation='mosaic_tpu' {wish}")


def refuses(tokens: Tokens) -> str | None:
    """What keeps these inputs from it on this process's devices; None: nothing."""
    return needs() or unsupported(tokens)


def needs() -> str | None:
    """What the kernels want of this process's devices, and what it got; None: nothing."""
    backend = jax.default_backend()
    return None if backend == "tpu" else f"needs a TPU, the backend is {backend!r}"


def unsupported(tokens: Tokens) -> str | None:
    """What the kernels want of these shapes and dtypes, and what they got; None: nothing."""
    rank, d_state, width = tokens.q_BLRGN.shape[2], tokens.q_BLRGN.shape[-1], tokens.v_BLHP.shape[-1]
    if tokens.log_a_BLH.dtype != jnp.float32:
        return f"computes in float32, log_a is {tokens.log_a_BLH.dtype}"
    dtype = product_dtype(tokens)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"wants q, k and v in float32 or bfloat16, not {dtype}"
    if rank not in RANKS:
        return f"wants a rank of {', '.join(map(str, RANKS))}, not {rank=}"
    if width > 128 or d_state > 256:
        return f"wants d_state up to 256 and P up to 128, not {d_state=}, P={width}"
    return None


def _last_padded(array_P, spare: int):
    if array_P is None or not spare:
        return array_P
    return jnp.pad(array_P, [(0, 0)] * (array_P.ndim - 1) + [(0, spare)])
