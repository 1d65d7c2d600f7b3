"""The op with its scan in a Pallas Triton kernel, for NVIDIA GPUs. A leaf: Pallas Triton is deprecated upstream."""

import jax
import jax.numpy as jnp

from mamba3_jax.ops import angle as angles
from mamba3_jax.ops.chunked import log_decay
from mamba3_jax.ops.chunks import documents, incoming, last_state, turned
from mamba3_jax.ops.discretize import trapezoid
from mamba3_jax.ops.output import finish
from mamba3_jax.ops.recurrent import ranked
from mamba3_jax.ops.rotary import to_planes, turn
from mamba3_jax.ops.types import Heads, State, Tokens

ROWS = 64  # of a chunk, ranks times tokens: what was fastest on an H200
PROGRAMS = 256  # that fill one: two on each of its 132 multiprocessors


def triton(
    tokens: Tokens,
    heads: Heads,
    state: State,
    *,
    rotation: str,
    chunk: int | None = None,
    segments: int | None = None,
    interpret: bool = False,
):
    """The sums of `chunked`, the scan over chunks fused in `pallas_kernels.ssm.triton`; what is around it is plain XLA.

    Angles and decays are summed in all chunks at once, and between chunks by an associative scan. The backward pass
    keeps the rotated queries and keys and the state before every chunk.

    Args:
        chunk: tokens a chunk; the kernel takes the power of two at or below it that its tiles allow.
        segments: how many parts of the length run side by side; None: as many as fill the device. Performance only.
        interpret: run the kernels' program on any backend, slowly, for tests.

    Raises:
        ValueError: no NVIDIA GPU, float64, a rank that is not a power of two up to 16, d_state over 256 or P over 128.
    """
    from pallas_kernels.ssm.triton import Tile, scan  # here, since everything else works without the kernels

    batch, length, rank, _, d_state = tokens.q_BLRGN.shape
    n_heads, width = tokens.v_BLHP.shape[2:]
    planes = tokens.angle_BLHS.shape[-1]
    check(tokens, interpret)
    chunk = _power_of_two(max(16, min(128, (chunk or ROWS // rank) * rank))) // rank
    n_chunks = -(-length // chunk)
    segments = segments or max(1, min(PROGRAMS // (batch * n_heads), n_chunks))
    n_chunks = -(-n_chunks // segments) * segments
    step = angles.grid(chunk)

    gamma_BLH, kappa_BLH, first_BH = trapezoid(tokens.dt_BLH, tokens.trap_BLH, tokens.start_BL)
    # Zeros after the end: dt = 0 and log_a = 0 leave the state as it is.
    padded, gamma_BLH, kappa_BLH = jax.tree.map(
        lambda array: jnp.pad(array, [(0, 0), (0, n_chunks * chunk - length), *[(0, 0)] * (array.ndim - 2)]),
        (tokens, gamma_BLH, kappa_BLH),
    )

    def chunks_apart(array_BL):
        return array_BL.reshape(batch * n_chunks, chunk, *array_BL.shape[2:])

    def by_head(array_BLH):
        return jnp.swapaxes(array_BLH, 1, 2)

    # Batch and chunks are one axis, E, where chunks do not depend on each other.
    start_EQ = None if padded.start_BL is None else chunks_apart(padded.start_BL)
    within_EQQ, document_EQ = documents(start_EQ, chunk)
    if document_EQ is None:
        document_EQ = jnp.zeros((batch * n_chunks, chunk), jnp.int32)
    document_BCQ = document_EQ.reshape(batch, n_chunks, chunk)

    before = angles.from_radians(state.angle_BHS, step)
    dt_EHQ, angle_EHQS = by_head(chunks_apart(padded.dt_BLH)), by_head(chunks_apart(padded.angle_BLHS))
    phi, last_turns = angles.advance_all(before, angle_EHQS, dt_EHQ, within_EQQ, document_BCQ, step)
    sin_BHLN, cos_BHLN = turn(*angles.sincos(phi), d_state)
    exact_EHQ, rest_EHQ = log_decay(by_head(chunks_apart(padded.log_a_BLH)), within_EQQ)

    def rows(array_BHLR):
        """(B, H, L, R, ...) -> (B, H, L R, ...), the last axis padded with zeros to what a tile can hold."""
        array_BHT = array_BHLR.reshape(batch, n_heads, n_chunks * chunk * rank, -1)
        size = array_BHT.shape[-1]
        return jnp.pad(array_BHT, [(0, 0)] * 3 + [(0, _tile_size(size) - size)]).astype(product_dtype)

    def row_scalars(array_EHQ):
        array_BCHQ = array_EHQ.reshape(batch, n_chunks, n_heads, chunk)
        return jnp.repeat(jnp.swapaxes(array_BCHQ, 1, 2).reshape(batch, n_heads, -1), rank, axis=-1)

    each_token = jax.tree.map(lambda array: array[:, None], heads)  # an axis for L between H and R
    product_dtype = jnp.result_type(tokens.q_BLRGN, tokens.k_BLRGN, tokens.v_BLHP)
    x_BHLRP = ranked(by_head(padded.v_BLHP).astype(jnp.float32), each_token)
    q_BHLRN, k_BHLRN = (
        turned(to_planes(x, planes, rotation), to_planes(bias, planes, rotation), sin_BHLN, cos_BHLN, planes)
        for x, bias in ((padded.q_BLRGN, each_token.q_bias_HRN), (padded.k_BLRGN, each_token.k_bias_HRN))
    )
    h_BHPN = to_planes(incoming(state, first_BH, heads), planes, rotation)
    spare = [(0, 0), (0, 0), (0, _tile_size(width) - width), (0, _tile_size(d_state) - d_state)]
    y_BHTP, h_BHPN = scan(
        *(rows(array) for array in (q_BHLRN, k_BHLRN, x_BHLRP)),
        *(row_scalars(array) for array in (exact_EHQ, rest_EHQ)),
        *(jnp.repeat(by_head(array), rank, axis=-1) for array in (gamma_BLH, kappa_BLH)),
        jnp.repeat(document_BCQ.reshape(batch, -1), rank, axis=-1),
        jnp.pad(h_BHPN, spare),
        Tile(rows=chunk * rank, rank=rank, segments=segments, interpret=interpret),
    )
    h_BHPN = h_BHPN[:, :, :width, :d_state]
    y_BHLRP = y_BHTP[..., :width].reshape(x_BHLRP.shape)

    gate_BHLP = None if padded.gate_BLHP is None else by_head(padded.gate_BLHP)
    y_BLHP = by_head(finish(y_BHLRP, x_BHLRP, gate_BHLP, each_token))[:, :length].astype(tokens.v_BLHP.dtype)
    return y_BLHP, last_state(tokens, heads, angles.to_radians(last_turns), h_BHPN, rotation)


def check(tokens: Tokens, interpret: bool) -> None:
    """Raise ValueError, naming it, for what the kernel does not support."""
    if not interpret and jax.default_backend() != "gpu":
        raise ValueError(f"implementation='triton' needs an NVIDIA GPU, the backend is {jax.default_backend()!r}")
    rank, d_state, width = tokens.q_BLRGN.shape[2], tokens.q_BLRGN.shape[-1], tokens.v_BLHP.shape[-1]
    if tokens.dt_BLH.dtype != jnp.float32:
        raise ValueError(f"implementation='triton' computes in float32, dt is {tokens.dt_BLH.dtype}")
    if rank & (rank - 1) or rank > 16:
        raise ValueError(f"implementation='triton' wants a rank that is a power of two up to 16, not {rank=}")
    if d_state > 256 or width > 128:
        raise ValueError(f"implementation='triton' wants d_state up to 256 and P up to 128, not {d_state=}, P={width}")


def _power_of_two(size: int) -> int:
    """The largest one that is not above."""
    return 1 << (size.bit_length() - 1)


def _tile_size(size: int) -> int:
    """The smallest power of two from 16 that is not below: products over fewer are silently wrong on the GPU."""
    return max(16, 1 << (size - 1).bit_length())
