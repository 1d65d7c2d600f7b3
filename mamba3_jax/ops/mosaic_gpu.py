"""The op's forward pass in Pallas Mosaic GPU, for Hopper: bias, rotation and scan in one kernel. bfloat16 only."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax.ops import triton as triton_op
from mamba3_jax.ops.chunks import incoming, last_state
from mamba3_jax.ops.discretize import trapezoid
from mamba3_jax.ops.rotary import from_planes, to_planes
from mamba3_jax.ops.types import Heads, State, Tokens

PROGRAMS = 264  # that fill an H200: two on each of its 132 multiprocessors
WIDTH = 64  # P, padded


def mosaic_gpu(
    tokens: Tokens,
    heads: Heads,
    state: State,
    *,
    rotation: str,
    chunk: int | None = None,
    segments: int | None = None,
    interpret: bool = False,
):
    """The sums of `chunked` in one fused kernel, `pallas_kernels.ssm.mosaic_gpu`; one token: as `triton`.

    Queries and keys are turned inside the scan: they are read as they come, once a head, and never stored turned. The
    backward pass is that of `triton`, which computes its forward pass again.

    Args:
        chunk: tokens a chunk of the backward pass; here it is always 64 rows, ranks times tokens.
        segments: how many parts of the length run side by side; None: as many as fill the device. Performance only.
        interpret: run the kernels' program on any backend, slowly, for tests.

    Raises:
        ValueError: no Hopper GPU, q, k and v not bfloat16, a rank other than 1, 2 or 4, P over 64, or d_state over 128
            with the planes padded to 16, 32 or 64.
    """
    check(tokens, interpret)
    how = (rotation, chunk, segments, interpret)
    if tokens.dt_BLH.shape[1] == 1:
        return triton_op.triton(tokens, heads, state, rotation=rotation, interpret=interpret)
    return _op(how, tokens._replace(start_BL=None), heads, state, tokens.start_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _op(how, tokens: Tokens, heads: Heads, state: State, start_BL):
    rotation, _, segments, interpret = how
    return _forward(tokens._replace(start_BL=start_BL), heads, state, rotation, segments, interpret)


def _op_fwd(how, tokens, heads, state, start_BL):
    return _op(how, tokens, heads, state, start_BL), (tokens, heads, state, start_BL)


def _op_bwd(how, residuals, cotangents):
    rotation, chunk, _, interpret = how
    tokens, heads, state, start_BL = residuals

    def op(tokens, heads, state):
        tokens = tokens._replace(start_BL=start_BL)
        return triton_op.triton(tokens, heads, state, rotation=rotation, chunk=chunk, interpret=interpret)

    _, pull = jax.vjp(op, tokens, heads, state)
    no_start = None if start_BL is None else np.zeros(start_BL.shape, jax.dtypes.float0)
    return *pull(cotangents), no_start


_op.defvjp(_op_fwd, _op_bwd)


def _forward(tokens: Tokens, heads: Heads, state: State, rotation: str, segments: int | None, interpret: bool):
    # Here, since everything else works without the kernels.
    from pallas_kernels.ssm.mosaic_gpu import phase, scan
    from pallas_kernels.ssm.triton import rotate
    from pallas_kernels.ssm.triton.common import Tile as TritonTile
    from pallas_kernels.ssm.triton.common import documents_in_chunks

    batch, length, rank, _, d_state = tokens.q_BLRGN.shape
    n_heads, width = tokens.v_BLHP.shape[2:]
    planes = tokens.angle_BLHS.shape[-1]
    layout = Layout(d_state, planes, rotation)
    chunk = scan.ROWS // rank
    n_chunks = -(-length // chunk)
    segments = segments or max(1, min(PROGRAMS // (batch * n_heads), n_chunks // 4))
    tile = scan.Tile(rank=rank, width=width, segments=segments, interpret=scan.interpreter() if interpret else None)
    padding = -length % (chunk * segments)

    gamma_BLH, kappa_BLH, first_BH = trapezoid(tokens.dt_BLH, tokens.trap_BLH, tokens.start_BL)
    first_BH = jax.lax.optimization_barrier(first_BH)  # see `triton`

    def padded(array_BL):
        """Zeros after the end: dt = 0 and log_a = 0 leave the state as it is."""
        if array_BL is None or not padding:
            return array_BL
        return jnp.pad(array_BL, [(0, 0), (0, padding), *[(0, 0)] * (array_BL.ndim - 2)])

    def wide(array_P):
        return _last_padded(array_P, WIDTH - width)

    def by_head(array_BLH):
        return jnp.swapaxes(padded(array_BLH), 1, 2)

    document_BL = None
    if tokens.start_BL is not None:
        document_BL = jnp.cumsum(padded(tokens.start_BL).astype(jnp.int32), axis=1)
    q_BLRGN, k_BLRGN = (layout.to(padded(x.astype(jnp.bfloat16))) for x in (tokens.q_BLRGN, tokens.k_BLRGN))
    angle_BLHS = _last_padded(padded(tokens.angle_BLHS), layout.planes - planes)
    angles = rotate.Inputs(
        q_BLRGN,
        k_BLRGN,
        None,
        None,
        angle_BLHS,
        by_head(tokens.dt_BLH),
        _last_padded(state.angle_BHS, layout.planes - planes),
        document_BL,
    )
    phase_BHLS, angle_BHS = phase.phase(angles, TritonTile(interpret=interpret))

    log_decay_BHL = sum(triton_op._log_decay(by_head(tokens.log_a_BLH), padded(tokens.start_BL), chunk))
    log_decay_BHL *= math.log2(math.e)
    scalars = [log_decay_BHL, log_decay_BHL - jnp.log2(by_head(kappa_BLH)), by_head(gamma_BLH)]
    if document_BL is not None:
        document_BHL = documents_in_chunks(document_BL, chunk)[:, None].astype(jnp.float32)
        scalars.append(jnp.broadcast_to(document_BHL, log_decay_BHL.shape))
    scalars_BHCXQ = jnp.stack([x.reshape(batch, n_heads, -1, chunk) for x in scalars], axis=3)

    float32 = lambda array: None if array is None else array.astype(jnp.float32)  # noqa: E731
    h_BHPN = layout.to(incoming(state, first_BH, heads))
    inputs = scan.Inputs(
        q_BLRGN,
        k_BLRGN,
        wide(padded(tokens.v_BLHP.astype(jnp.bfloat16))),
        wide(None if tokens.gate_BLHP is None else padded(tokens.gate_BLHP.astype(jnp.bfloat16))),
        phase_BHLS,
        jnp.tile(scalars_BHCXQ, rank),
        jnp.pad(h_BHPN, [(0, 0), (0, 0), (0, WIDTH - width), (0, 0)])[:, :, None],
        *(float32(layout.to(x)) for x in (heads.q_bias_HRN, heads.k_bias_HRN)),
        float32(heads.skip_H),
        *(float32(wide(x)) for x in (heads.v_rank_HRP, heads.gate_rank_HRP, heads.out_rank_HRP, heads.norm_HP)),
    )
    out = scan.scan(inputs, tile)
    y_BLHP = out.o_BLHP[:, :length, :, :width].astype(tokens.v_BLHP.dtype)
    h_BHPN = layout.back(out.h_BHSPN[:, :, -1, :width])
    return y_BLHP, last_state(tokens, heads, angle_BHS[..., :planes], h_BHPN, rotation)


class Layout:
    """Where the kernel keeps the entries of a state: the first entries of S planes, the second ones, and the rest.

    S is 16, 32 or 64 there and N 64 or 128: other sizes get room between. Products of queries and keys do not see the
    order.
    """

    def __init__(self, d_state: int, planes: int, rotation: str):
        self.own_planes, self.rest, self.rotation = planes, d_state - 2 * planes, rotation
        self.planes = max(16, 1 << (planes - 1).bit_length())
        self.size = max(64, 1 << (2 * self.planes + self.rest - 1).bit_length())

    def to(self, array_N):
        """From the op's order to the kernel's, zeros in between."""
        planes = self.own_planes
        parts = jnp.split(to_planes(array_N, planes, self.rotation), (planes, 2 * planes), axis=-1)
        spare = (self.planes - planes, self.planes - planes, self.size - 2 * self.planes - self.rest)
        return jnp.concatenate([_last_padded(x, more) for x, more in zip(parts, spare, strict=True)], axis=-1)

    def back(self, array_N):
        parts = (array_N[..., begin : begin + size] for begin, size in self._parts())
        return from_planes(jnp.concatenate(list(parts), axis=-1), self.own_planes, self.rotation)

    def _parts(self):
        return (0, self.own_planes), (self.planes, self.own_planes), (2 * self.planes, self.rest)


def check(tokens: Tokens, interpret: bool) -> None:
    """Raise ValueError, naming it, for what the kernel does not support."""
    if not interpret:
        capability = _capability()
        if capability != "9.0":
            found = jax.default_backend() if capability is None else f"a GPU of compute capability {capability}"
            raise ValueError(f"implementation='mosaic_gpu' needs a Hopper GPU (compute capability 9.0), not {found}")
    wish = unsupported(tokens)
    if wish is not None:
        raise ValueError(f"implementation='mosaic_gpu' {wish}")


def _capability() -> str | None:
    """Of the first GPU; None: there is none."""
    if jax.default_backend() != "gpu":
        return None
    return getattr(jax.local_devices()[0], "compute_capability", "unknown")


def unsupported(tokens: Tokens) -> str | None:
    """What the kernel wants of these shapes and dtypes, and what it got; None: nothing."""
    rank, d_state, width = tokens.q_BLRGN.shape[2], tokens.q_BLRGN.shape[-1], tokens.v_BLHP.shape[-1]
    planes = tokens.angle_BLHS.shape[-1]
    if tokens.dt_BLH.dtype != jnp.float32:
        return f"computes in float32, dt is {tokens.dt_BLH.dtype}"
    dtype = jnp.result_type(tokens.q_BLRGN, tokens.k_BLRGN, tokens.v_BLHP)
    if dtype != jnp.bfloat16:
        return f"wants q, k and v in bfloat16, not {dtype}: Hopper's wgmma has no products of true float32"
    if rank not in (1, 2, 4):
        return f"wants a rank of 1, 2 or 4, not {rank=}"
    if width > WIDTH or Layout(d_state, planes, "half").size > 128:
        room = "d_state up to 128 (with the planes padded to 16, 32 or 64) and P up to 64"
        return f"wants {room}, not {d_state=} with {planes=}, P={width}"
    return None


def _last_padded(array_P, spare: int):
    if array_P is None or not spare:
        return array_P
    return jnp.pad(array_P, [(0, 0)] * (array_P.ndim - 1) + [(0, spare)])
