"""The op's forward pass in Pallas Mosaic GPU, for Hopper: bias, rotation and scan in one kernel. bfloat16 only."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba3_jax.ops import triton
from mamba3_jax.ops.chunks import incoming, last_state
from mamba3_jax.ops.discretize import trapezoid
from mamba3_jax.ops.rotary import from_planes, to_planes
from mamba3_jax.ops.types import Heads, State, Tokens

PROGRAMS = 264  # that fill an H200: two on each of its 132 multiprocessors
ROWS, WIDTH = 64, 64  # of a chunk; P, padded


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
    backward pass is that of `triton`, which turns them again; it keeps the inputs, the outputs before norm and gate,
    and the state before every segment.

    Args:
        chunk: ignored: it is always 64 rows, ranks times tokens.
        segments: how many parts of the length run side by side; None: as many as fill the device. Performance only.
        interpret: run the kernels' program on any backend, slowly, for tests.

    Raises:
        ValueError: no Hopper GPU, q, k and v not bfloat16, a rank other than 1, 2 or 4, P over 64, or d_state over 128
            with the planes padded to 16, 32 or 64.
    """
    check(tokens, interpret)
    if tokens.dt_BLH.shape[1] == 1:
        return triton.triton(tokens, heads, state, rotation=rotation, interpret=interpret)
    batch, length, rank = tokens.q_BLRGN.shape[:3]
    n_heads = tokens.v_BLHP.shape[2]
    chunk = ROWS // rank
    segments = segments or max(1, min(PROGRAMS // (batch * n_heads), -(-length // chunk) // 4))
    padding = -length % (chunk * segments)

    gamma_BLH, kappa_BLH, first_BH = trapezoid(tokens.dt_BLH, tokens.trap_BLH, tokens.start_BL)
    first_BH = jax.lax.optimization_barrier(first_BH)  # see `triton`

    def padded(array_BL):
        """Zeros after the end: dt = 0 and log_a = 0 leave the state as it is."""
        if array_BL is None or not padding:
            return array_BL
        return jnp.pad(array_BL, [(0, 0), (0, padding), *[(0, 0)] * (array_BL.ndim - 2)])

    def by_head(array_BLH):
        return jnp.swapaxes(padded(array_BLH), 1, 2)

    document_BL = None
    if tokens.start_BL is not None:
        document_BL = jnp.cumsum(padded(tokens.start_BL).astype(jnp.int32), axis=1)
    narrow = (tokens.q_BLRGN, tokens.k_BLRGN, tokens.v_BLHP, tokens.gate_BLHP)
    per_token = Scan(
        *(None if x is None else padded(x.astype(jnp.bfloat16)) for x in narrow),
        padded(tokens.angle_BLHS),
        by_head(tokens.dt_BLH),
        sum(triton._log_decay(by_head(tokens.log_a_BLH), padded(tokens.start_BL), chunk)),
        by_head(gamma_BLH),
        by_head(kappa_BLH),
        state.angle_BHS,
        incoming(state, first_BH, heads),
        heads,
    )
    y_BLHP, h_BHPN, angle_BHS = _scan((rotation, segments, interpret), per_token, document_BL)
    return y_BLHP[:, :length].astype(tokens.v_BLHP.dtype), last_state(tokens, heads, angle_BHS, h_BHPN, rotation)


class Scan(NamedTuple):
    """What the kernels of both passes read: whole chunks, entries of P and N as the op has them."""

    q_BLRGN: jax.Array
    k_BLRGN: jax.Array
    v_BLHP: jax.Array
    gate_BLHP: jax.Array | None
    angle_BLHS: jax.Array
    dt_BHL: jax.Array
    log_decay_BHL: jax.Array  # since the first token of the chunk, or of its document in the chunk
    gamma_BHL: jax.Array
    kappa_BHL: jax.Array
    angle_BHS: jax.Array  # before the row, as the state
    h_BHPN: jax.Array
    heads: Heads


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(how, inputs: Scan, document_BL):
    """y_BLHP, the last h_BHPN, and the last angle_BHS."""
    return _forward(how, inputs, document_BL, keep=False)[0]


def _scan_fwd(how, inputs: Scan, document_BL):
    results, kept = _forward(how, inputs, document_BL, keep=True)
    return results, (inputs, document_BL, kept)


def _forward(how, inputs: Scan, document_BL, *, keep: bool):
    """The results, and what the backward pass needs beside the inputs."""
    # Here, since everything else works without the kernels.
    from pallas_kernels.ssm.mosaic_gpu import phase, scan
    from pallas_kernels.ssm.triton import common, rotate

    rotation, segments, interpret = how
    batch, n_heads, _ = inputs.dt_BHL.shape
    rank, _, d_state = inputs.q_BLRGN.shape[2:]
    width, planes = inputs.v_BLHP.shape[-1], inputs.angle_BHS.shape[-1]
    layout = Layout(d_state, planes, rotation)
    interpreter = scan.interpreter() if interpret else None
    tile = scan.Tile(rank=rank, width=width, segments=segments, keep=keep, interpret=interpreter)

    wide = lambda array_P: _last_padded(array_P, WIDTH - width)  # noqa: E731
    turning = lambda array_S: _last_padded(array_S, layout.planes - planes)  # noqa: E731
    float32 = lambda array: None if array is None else array.astype(jnp.float32)  # noqa: E731
    q_BLRGN, k_BLRGN = layout.to(inputs.q_BLRGN), layout.to(inputs.k_BLRGN)
    angles = (turning(inputs.angle_BLHS), inputs.dt_BHL, turning(inputs.angle_BHS), document_BL)
    phase_BHLS, angle_BHS = phase.phase(
        rotate.Inputs(q_BLRGN, k_BLRGN, None, None, *angles), common.Tile(interpret=interpret)
    )
    log_decay_BHL = inputs.log_decay_BHL * math.log2(math.e)
    scalars = [log_decay_BHL, log_decay_BHL - jnp.log2(inputs.kappa_BHL), inputs.gamma_BHL]
    if document_BL is not None:
        document_BHL = common.documents_in_chunks(document_BL, tile.tokens)[:, None].astype(jnp.float32)
        scalars.append(jnp.broadcast_to(document_BHL, log_decay_BHL.shape))
    scalars_BHCXQ = jnp.stack([x.reshape(batch, n_heads, -1, tile.tokens) for x in scalars], axis=3)

    heads, h_BHPN = inputs.heads, layout.to(inputs.h_BHPN)
    out, starts_BHSPN, left_BHS = scan.scan(
        scan.Inputs(
            q_BLRGN,
            k_BLRGN,
            wide(inputs.v_BLHP),
            wide(inputs.gate_BLHP),
            phase_BHLS,
            jnp.tile(scalars_BHCXQ, rank),
            jnp.pad(h_BHPN, [(0, 0), (0, 0), (0, WIDTH - width), (0, 0)])[:, :, None],
            *(float32(layout.to(x)) for x in (heads.q_bias_HRN, heads.k_bias_HRN)),
            float32(heads.skip_H),
            *(float32(wide(x)) for x in (heads.v_rank_HRP, heads.gate_rank_HRP, heads.out_rank_HRP, heads.norm_HP)),
        ),
        tile,
    )
    h_BHPN = layout.back(out.h_BHSPN[:, :, -1, :width])
    kept = None
    if keep:
        kept = out.y_BLHRP[..., :width], layout.back(starts_BHSPN[..., :width, :]), left_BHS, h_BHPN
    return (out.o_BLHP[..., :width], h_BHPN, angle_BHS[..., :planes]), kept


def _scan_bwd(how, residuals, cotangents):
    from pallas_kernels.ssm.triton import common, rotate, scan, scan_back

    rotation, segments, interpret = how
    inputs, document_BL, (y_BLHRP, starts_BHSPN, left_BHS, last_BHPN) = residuals
    do_BLHP, dlast_BHPN, dangle_BHS = cotangents
    rank, _, d_state = inputs.q_BLRGN.shape[2:]
    width, planes = inputs.v_BLHP.shape[-1], inputs.angle_BHS.shape[-1]
    layout, spare = triton.Layout(d_state, planes, rotation), triton._tile_size(width) - width
    by_hand = {"value": common.Launch(4, 1)} if rank > 1 else {}  # see `triton.tile_of`
    tile = common.Tile(rank=rank, width=width, segments=segments, interpret=interpret, **by_hand)

    wide = lambda array_P: _last_padded(array_P, spare)  # noqa: E731
    turning = lambda array_S: _last_padded(array_S, layout.planes - planes)  # noqa: E731
    tall = lambda array_PN: jnp.pad(layout.to(array_PN), [*[(0, 0)] * (array_PN.ndim - 2), (0, spare), (0, 0)])  # noqa: E731
    by_row = lambda array_L: None if array_L is None else jnp.repeat(array_L, rank, axis=-1)  # noqa: E731

    def as_triton(inputs: Scan):
        """Its inputs, from queries and keys turned again, and the last angle."""
        heads = inputs.heads
        unturned = (inputs.q_BLRGN, inputs.k_BLRGN, heads.q_bias_HRN, heads.k_bias_HRN)
        angles = (turning(inputs.angle_BLHS), inputs.dt_BHL, turning(inputs.angle_BHS), document_BL)
        q_BHTN, k_BHTN, angle_BHS = rotate.rotate(rotate.Inputs(*(layout.to(x) for x in unturned), *angles), tile)
        document_BT = by_row(common.documents_in_chunks(document_BL, tile.tokens))
        weights = (heads.v_rank_HRP, heads.gate_rank_HRP, heads.out_rank_HRP, heads.norm_HP)
        turned = scan.Inputs(
            q_BHTN,
            k_BHTN,
            wide(inputs.v_BLHP),
            wide(inputs.gate_BLHP),
            by_row(inputs.log_decay_BHL),
            None,
            by_row(inputs.gamma_BHL),
            by_row(inputs.kappa_BHL),
            None,
            tall(inputs.h_BHPN)[:, :, None],
            heads.skip_H,
            *(wide(x) for x in weights),
        )
        return (turned, angle_BHS[..., :planes]), document_BT

    (turned, _), pull, document_BT = jax.vjp(as_triton, inputs, has_aux=True)
    kept = (turned._replace(document_BT=document_BT), wide(y_BLHRP), tall(starts_BHSPN), left_BHS, tall(last_BHPN))
    (gradients,) = scan_back._scan_bwd(tile, kept, (wide(do_BLHP), tall(dlast_BHPN)))
    return *pull((gradients, dangle_BHS)), None


_scan.defvjp(_scan_fwd, _scan_bwd)


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
