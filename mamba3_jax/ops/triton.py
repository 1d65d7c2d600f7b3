"""The op in Pallas Triton kernels, for NVIDIA GPUs. A leaf: Pallas Triton is deprecated upstream."""

import dataclasses

import jax
import jax.numpy as jnp

from mamba3_jax.ops import choices
from mamba3_jax.ops.chunked import log_decay
from mamba3_jax.ops.chunks import documents, incoming, last_state
from mamba3_jax.ops.discretize import later_weight
from mamba3_jax.ops.rotary import from_planes, to_planes
from mamba3_jax.ops.types import Heads, State, Tokens, empty_state, product_dtype

PROGRAMS = 256  # that fill an H200: two on each of its 132 multiprocessors


def triton(
    tokens: Tokens,
    heads: Heads,
    state: State | None,
    *,
    rotation: str,
    chunk: int | None = None,
    segments: int | None = None,
    interpret: bool = False,
    **launch,
):
    """The sums of `chunked` in two fused kernels, `pallas_kernels.ssm.triton.op`: rotate, scan; one token: `decode`.

    The backward pass keeps the inputs, rotated queries and keys, the outputs before norm and gate, and the state before
    every segment; for the policies of `jax.checkpoint` these are named ssm_rotated, ssm_y and ssm_states.

    Args:
        chunk: tokens a chunk; the kernel takes the power of two at or below it that its tiles allow.
        segments: how many parts of the length run side by side; None: as many as there are `programs` for.
        interpret: run the kernels' program on any backend, slowly, for tests.
        launch: other fields of `pallas_kernels.ssm.triton.common.Tile`, and `programs`, how many fill the device.
            What is not given is the table's (`choices`) or, where it has nothing, chosen by hand. Performance only.

    Raises:
        ValueError: no NVIDIA GPU, float64, a rank that is not a power of two up to 16, d_state over 256, P over 128, or
            float32 with P d_state over 128 x 128.
    """
    # Here, since everything else works without the kernels.
    from mamba3_jax.ops import decode
    from pallas_kernels.ssm.triton import op

    check(tokens, interpret)
    state = empty_state(tokens) if state is None else state
    launch = choices.launch("triton", tokens) | launch
    if tokens.log_a_BLH.shape[1] == 1:
        tile = None
        if launch:
            tile = decode.default_tile(tokens.q_BLRGN.shape[2])
            tile = dataclasses.replace(tile, **_known(launch, tile))
        return decode.decode(tokens, heads, state, rotation=rotation, interpret=interpret, tile=tile)
    length, d_state = tokens.q_BLRGN.shape[1], tokens.q_BLRGN.shape[-1]
    width = tokens.v_BLHP.shape[-1]
    planes = planes_of(tokens)
    layout = Layout(d_state, planes, rotation)
    dtype = product_dtype(tokens)

    launch |= {name: value for name, value in (("chunk", chunk), ("segments", segments)) if value}
    tile = tile_of(tokens, layout.size, launch, interpret)
    chunk = tile.tokens
    unit = max(chunk, tile.turned) * tile.segments
    padding = -length % unit

    kappa_BLH, first_BH = later_weight(tokens.gamma_BLH, tokens.beta_BLH, tokens.start_BL)
    # Or XLA for GPU sums the gradient of first_BH, of all of a state, again for every token.
    first_BH = jax.lax.optimization_barrier(first_BH)

    def padded(array_BL):
        """Zeros after the end: gamma = 0 and log_a = 0 leave the state as it is."""
        if array_BL is None or not padding:
            return array_BL
        return jnp.pad(array_BL, [(0, 0), (0, padding), *[(0, 0)] * (array_BL.ndim - 2)])

    def by_head(array_BLH):
        return None if array_BLH is None else jnp.swapaxes(padded(array_BLH), 1, 2)

    document_BL = None
    if tokens.start_BL is not None:
        document_BL = jnp.cumsum(padded(tokens.start_BL).astype(jnp.int32), axis=1)

    spare = _tile_size(width) - width
    wide = lambda array_P: _padded_last(array_P, spare)  # noqa: E731
    turning = lambda array_S: _padded_last(array_S, layout.planes - planes)  # noqa: E731
    log_decay_BHL, rest_BHL = _log_decay(by_head(tokens.log_a_BLH), padded(tokens.start_BL), chunk)
    if dtype != jnp.float32:  # whose products have fewer digits than the sum's parts
        log_decay_BHL, rest_BHL = log_decay_BHL + rest_BHL, None
    inputs = op.Inputs(
        *(layout.to(padded(x.astype(dtype))) for x in (tokens.q_BLRGN, tokens.k_BLRGN)),
        wide(padded(tokens.v_BLHP.astype(dtype))),
        wide(None if tokens.gate_BLHP is None else padded(tokens.gate_BLHP.astype(dtype))),
        turning(padded(tokens.angle_BLHS)),
        by_head(tokens.dt_BLH) if planes else None,
        log_decay_BHL,
        rest_BHL,
        by_head(tokens.gamma_BLH),
        by_head(kappa_BLH),
        turning(state.angle_BHS),
        jnp.pad(layout.to(incoming(state, first_BH, heads)), [(0, 0), (0, 0), (0, spare), (0, 0)]),
        layout.to(heads.q_bias_HRN),
        layout.to(heads.k_bias_HRN),
        heads.skip_H,
        *(wide(x) for x in (heads.v_rank_HRP, heads.gate_rank_HRP, heads.out_rank_HRP, heads.norm_HP)),
    )
    y_BLHP, h_BHPN, angle_BHS = op.mamba3(inputs, document_BL, tile)
    h_BHPN = layout.back(h_BHPN[:, :, :width])
    y_BLHP = y_BLHP[:, :length, :, :width].astype(tokens.v_BLHP.dtype)
    angle_BHS = None if angle_BHS is None else angle_BHS[..., :planes]
    return y_BLHP, last_state(tokens, heads, angle_BHS, h_BHPN, rotation)


def planes_of(tokens: Tokens) -> int:
    """S; 0 where nothing turns."""
    return 0 if tokens.angle_BLHS is None else tokens.angle_BLHS.shape[-1]


def tile_of(tokens: Tokens, d_state: int, launch: dict, interpret: bool):
    """The kernels' `Tile`: what `launch` says, the rest chosen by hand. `d_state` is the kernels'."""
    from pallas_kernels.ssm.triton.common import Launch, Tile

    batch, length, rank = tokens.q_BLRGN.shape[:3]
    n_heads, width = tokens.v_BLHP.shape[2:]
    launch = _known(launch, Tile, "chunk", "programs")
    # Of a kernel, as JSON has it: [warps, stages].
    launch = {name: Launch(*value) if isinstance(value, list) else value for name, value in launch.items()}

    dtype = product_dtype(tokens)
    large = _tile_size(width) * d_state > 64 * 128
    rows = launch.pop("chunk", 0) * rank or 64 >> (large and dtype == jnp.float32)
    rows = _power_of_two(max(16, rank, min(64, rows)))
    n_chunks = -(-length // (rows // rank))
    segments = max(1, min(launch.pop("programs", PROGRAMS) // (batch * n_heads), n_chunks // 4))
    by_hand = {"segments": segments}
    if rank > 1:
        by_hand["anchor"] = 256  # 512, as for one rank: 0.11 ms of 1.45 slower (H100, R4 B16 L2048 H32)
    if large:  # a state that fills the registers of four warps, and tiles that fill shared memory
        by_hand |= dict.fromkeys(("forward", "added", "query", "key", "value"), Launch(8, 1))
    elif rank > 1:
        by_hand["value"] = Launch(4, 1)
    return Tile(**{"rows": rows, "rank": rank, "width": width, "interpret": interpret} | by_hand | launch)


class Layout:
    """Where the kernels keep the entries of a state: plane i at (2 i, 2 i + 1), then what does not turn.

    N and S are powers of two there, and N = 2 S or 4 S: other sizes get room between. Products of queries and keys do
    not see the order.
    """

    def __init__(self, d_state: int, planes: int, rotation: str):
        self.own_planes, self.rest, self.rotation = planes, d_state - 2 * planes, rotation
        self.planes = max(4, 1 << (planes - 1).bit_length()) if planes else 0
        if not planes:  # nothing turns
            self.size = _tile_size(d_state)
            self.same = self.size == d_state
            return
        while self.rest > 2 * self.planes or (self.planes < 8 and not self.rest):
            self.planes *= 2
        self.size = 4 * self.planes if self.rest else 2 * self.planes
        self.same = rotation == "adjacent" and self.size == d_state and self.planes == planes

    def to(self, array_N):
        """From the op's order to the kernels', zeros in between."""
        if self.same or array_N is None:
            return array_N
        if not self.planes:
            return _padded_last(array_N, self.size - self.rest)
        planes = self.own_planes
        first, second, rest = jnp.split(to_planes(array_N, planes, self.rotation), (planes, 2 * planes), axis=-1)
        pairs = jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)
        spare = (2 * (self.planes - planes), self.size - 2 * self.planes - self.rest)
        return jnp.concatenate([_padded_last(x, more) for x, more in zip((pairs, rest), spare, strict=True)], axis=-1)

    def back(self, array_N):
        if self.same:
            return array_N
        if not self.planes:
            return array_N[..., : self.rest]
        pairs = array_N[..., : 2 * self.own_planes].reshape(*array_N.shape[:-1], self.own_planes, 2)
        rest = array_N[..., 2 * self.planes :][..., : self.rest]
        in_planes = jnp.concatenate([pairs[..., 0], pairs[..., 1], rest], axis=-1)
        return from_planes(in_planes, self.own_planes, self.rotation)


def _log_decay(log_a_BHL, start_BL, chunk: int):
    """`log_decay` of every chunk: two (B, H, L)."""
    batch, n_heads = log_a_BHL.shape[:2]
    start_EQ = None if start_BL is None else start_BL.reshape(-1, chunk)
    within_EQQ, _ = documents(start_EQ, chunk)
    log_a_BCHQ = jnp.swapaxes(log_a_BHL.reshape(batch, n_heads, -1, chunk), 1, 2)
    parts_EHQ = log_decay(log_a_BCHQ.reshape(-1, n_heads, chunk), within_EQQ)
    parts_BCHQ = (part.reshape(log_a_BCHQ.shape) for part in parts_EHQ)
    return [jnp.swapaxes(part, 1, 2).reshape(log_a_BHL.shape) for part in parts_BCHQ]


def check(tokens: Tokens, interpret: bool) -> None:
    """Raise ValueError, naming it, for what the kernels do not support."""
    if not interpret and jax.default_backend() != "gpu":
        raise ValueError(f"implementation='triton' needs an NVIDIA GPU, the backend is {jax.default_backend()!r}")
    wish = unsupported(tokens)
    if wish is not None:
        raise ValueError(f"implementation='triton' {wish}")


def refuses(tokens: Tokens) -> str | None:
    """What keeps these inputs from it on this process's devices; None: nothing."""
    device = jax.devices()[0].device_kind
    return unsupported(tokens) if "NVIDIA" in device else f"needs an NVIDIA GPU, not {device!r}"


def unsupported(tokens: Tokens) -> str | None:
    """What the kernels want of these shapes and dtypes, and what they got; None: nothing."""
    rank, d_state, width = tokens.q_BLRGN.shape[2], tokens.q_BLRGN.shape[-1], tokens.v_BLHP.shape[-1]
    planes = planes_of(tokens)
    if tokens.log_a_BLH.dtype != jnp.float32:
        return f"computes in float32, log_a is {tokens.log_a_BLH.dtype}"
    dtype = product_dtype(tokens)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"wants q, k and v in float32 or bfloat16, not {dtype}"
    if rank & (rank - 1) or rank > 16:
        return f"wants a rank that is a power of two up to 16, not {rank=}"
    if width > 128 or Layout(d_state, planes, "half").size > 256:
        room = "d_state up to 256 (with room for the planes) and P up to 128"
        return f"wants {room}, not {d_state=} with {planes=}, P={width}"
    if dtype == jnp.float32 and _tile_size(width) * Layout(d_state, planes, "half").size > 128 * 128:
        return f"has no room for float32 with P d_state over 128 x 128, not {d_state=}, P={width}"
    return None


def _known(launch: dict, tile, *more: str) -> dict:
    """`launch`, after ValueError for what is neither a field of `tile` nor one of `more`."""
    known = {field.name for field in dataclasses.fields(tile)} | set(more)
    if unknown := sorted(set(launch) - known):
        raise ValueError(f"implementation='triton' has no {', '.join(unknown)} to be launched with: {sorted(known)}")
    return launch


def _padded_last(array_P, spare: int):
    if array_P is None or not spare:
        return array_P
    return jnp.pad(array_P, [(0, 0)] * (array_P.ndim - 1) + [(0, spare)])


def _power_of_two(size: int) -> int:
    """The largest one that is not above."""
    return 1 << (size.bit_length() - 1)


def _tile_size(size: int) -> int:
    """The smallest power of two from 16 that is not below: products over fewer are silently wrong on the GPU."""
    return max(16, 1 << (size - 1).bit_length())
