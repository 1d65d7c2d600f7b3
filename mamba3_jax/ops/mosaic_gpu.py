"""The op in Pallas Mosaic GPU, for Hopper: bias, rotation and scan in one kernel, three with the backward pass."""

import jax
import jax.numpy as jnp

from mamba3_jax.ops import choices, triton
from mamba3_jax.ops.chunks import incoming, last_state
from mamba3_jax.ops.discretize import later_weight
from mamba3_jax.ops.rotary import from_planes, to_planes
from mamba3_jax.ops.types import Heads, State, Tokens, empty_state, product_dtype

PROGRAMS = 264  # that fill an H200: two on each of its 132 multiprocessors
ROWS, WIDTH = 64, 64  # of a chunk; P, padded


def mosaic_gpu(
    tokens: Tokens,
    heads: Heads,
    state: State | None,
    *,
    rotation: str,
    chunk: int | None = None,
    segments: int | None = None,
    programs: int | None = None,
    interpret: bool = False,
):
    """The sums of `chunked` in one fused kernel, `pallas_kernels.ssm.mosaic_gpu`; one token: see `one_token`.

    Queries and keys are turned inside the scans: they are read as they come, once a head, and never stored turned. The
    backward pass keeps the inputs, the angles, the outputs before norm and gate, and the state before every segment.
    bfloat16 only: Hopper's wgmma has no products of true float32.

    Args:
        chunk: ignored: it is always 64 rows, ranks times tokens.
        segments: how many parts of the length run side by side; None: as many as there are `programs` for.
        programs: how many fill the device; None: the table's (`choices`), or two on each of an H200's multiprocessors.
        interpret: run the kernels' program on any backend, slowly, for tests.

    Raises:
        ValueError: no Hopper GPU, q, k and v not bfloat16, a rank other than 1, 2 or 4, P over 64, or d_state over 128
            with the planes padded to 16, 32 or 64.
    """
    # Here, since everything else works without the kernels.
    from pallas_kernels.ssm.mosaic_gpu import op, scan

    check(tokens, interpret)
    state = empty_state(tokens) if state is None else state
    if tokens.log_a_BLH.shape[1] == 1:
        return one_token(tokens, heads, state, rotation, interpret)
    batch, length, rank = tokens.q_BLRGN.shape[:3]
    n_heads = tokens.v_BLHP.shape[2]
    chunk = ROWS // rank
    programs = programs or choices.launch("mosaic_gpu", tokens).get("programs", PROGRAMS)
    segments = segments or max(1, min(programs // (batch * n_heads), -(-length // chunk) // 4))
    padding = -length % (chunk * segments)

    kappa_BLH, first_BH = later_weight(tokens.gamma_BLH, tokens.beta_BLH, tokens.start_BL)
    kappa_BLH = tokens.gamma_BLH if kappa_BLH is None else kappa_BLH
    first_BH = jax.lax.optimization_barrier(first_BH)  # see `triton`

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
    width, planes = tokens.v_BLHP.shape[-1], planes_of(tokens)
    # Where nothing turns, any order of N will do: the kernels' own, so that no columns are moved.
    layout = Layout(tokens.q_BLRGN.shape[-1], planes, "half" if tokens.angle_BLHS is None else rotation)
    wide = lambda array_P: _last_padded(array_P, WIDTH - width)  # noqa: E731
    turning = lambda array_S: _last_padded(array_S, layout.planes - planes)  # noqa: E731
    narrow = lambda array_BL: None if array_BL is None else padded(array_BL.astype(jnp.bfloat16))  # noqa: E731
    float32 = lambda array: None if array is None else array.astype(jnp.float32)  # noqa: E731
    h_BHPN = layout.to(incoming(state, first_BH, heads))
    v_BLHP, v_rank_HRP = tokens.v_BLHP, heads.v_rank_HRP
    if rank == 1 and v_rank_HRP is not None:  # the kernels have weights of several ranks only
        v_BLHP, v_rank_HRP = v_BLHP.astype(jnp.float32) * v_rank_HRP[:, 0], None
    inputs = op.Inputs(
        q_BLRGN=layout.to(narrow(tokens.q_BLRGN)),
        k_BLRGN=layout.to(narrow(tokens.k_BLRGN)),
        v_BLHP=wide(narrow(v_BLHP)),
        gate_BLHP=wide(narrow(tokens.gate_BLHP)),
        angle_BLHS=turning(padded(tokens.angle_BLHS)),
        dt_BHL=by_head(tokens.dt_BLH),
        log_decay_BHL=sum(triton._log_decay(by_head(tokens.log_a_BLH), padded(tokens.start_BL), chunk)),
        gamma_BHL=by_head(tokens.gamma_BLH),
        kappa_BHL=by_head(kappa_BLH),
        first_BHS=turning(state.angle_BHS),
        h_BHPN=jnp.pad(h_BHPN, [(0, 0), (0, 0), (0, WIDTH - width), (0, 0)]),
        q_bias_HRN=float32(layout.to(heads.q_bias_HRN)),
        k_bias_HRN=float32(layout.to(heads.k_bias_HRN)),
        skip_H=float32(heads.skip_H),
        v_rank_HRP=float32(wide(v_rank_HRP)),
        gate_rank_HRP=float32(wide(heads.gate_rank_HRP)),
        out_rank_HRP=float32(wide(heads.out_rank_HRP)),
        norm_HP=float32(wide(heads.norm_HP)),
    )
    interpreter = scan.interpreter() if interpret else None
    tile = scan.Tile(rank=rank, width=width, splits=segments, interpret=interpreter)
    y_BLHP, h_BHPN, angle_BHS = op.mamba3(inputs, document_BL, tile)
    y_BLHP = y_BLHP[:, :length, :, :width].astype(tokens.v_BLHP.dtype)
    h_BHPN = layout.back(h_BHPN[:, :, :width])
    angle_BHS = None if angle_BHS is None else angle_BHS[..., :planes]
    return y_BLHP, last_state(tokens, heads, angle_BHS, h_BHPN, rotation)


def planes_of(tokens: Tokens) -> int:
    """S; where nothing turns, as many as the kernels' order of N has without padding: see `Layout`."""
    return max(1, tokens.k_BLRGN.shape[-1] // 4) if tokens.angle_BLHS is None else tokens.angle_BLHS.shape[-1]


def one_token(tokens: Tokens, heads: Heads, state: State, rotation: str, interpret: bool):
    """By the decoding step's Mosaic kernel where it can (P 64, N 64 or 128), by Triton's elsewhere."""
    from mamba3_jax.ops import decode
    from pallas_kernels.ssm.mosaic_gpu.decode import Tile
    from pallas_kernels.ssm.mosaic_gpu.scan import interpreter

    width, d_state = state.ssm_BHPN.shape[2:]
    tile = None
    if width == 64 and d_state in (64, 128):
        tile = Tile(interpret=interpreter() if interpret else None)
    return decode.decode(tokens, heads, state, rotation=rotation, interpret=interpret, tile=tile)


class Layout:
    """Where the kernels keep the entries of a state: plane i at (i, i + N / 2), as MIMO weights do, the rest between.

    S is 16, 32 or 64 there and N 64 or 128: other sizes get room. Products of queries and keys do not see the order.
    """

    def __init__(self, d_state: int, planes: int, rotation: str):
        self.own_planes, self.rest, self.rotation = planes, d_state - 2 * planes, rotation
        self.planes = max(16, 1 << (planes - 1).bit_length())
        self.size = max(64, 1 << (2 * self.planes + self.rest - 1).bit_length())
        self.same = rotation == "half" and (self.planes, self.size) == (planes, d_state)
        room = self.size // 2 - self.planes
        # Of the entries in plane order (first ones, second ones, rest), where each run begins, its size, and its room.
        first_rest = min(room, self.rest)
        self.runs = (
            (0, planes, self.planes),
            (2 * planes, first_rest, room),
            (planes, planes, self.planes),
            (2 * planes + first_rest, self.rest - first_rest, room),
        )

    def to(self, array_N):
        """From the op's order to the kernels', zeros in between; None stays None."""
        if array_N is None or self.same:
            return array_N
        array_N = to_planes(array_N, self.own_planes, self.rotation)
        parts = [_last_padded(array_N[..., begin : begin + size], room - size) for begin, size, room in self.runs]
        return jnp.concatenate(parts, axis=-1)

    def back(self, array_N):
        if self.same:
            return array_N
        firsts, rest, seconds, more = jnp.split(
            array_N, [self.planes, self.size // 2, self.size // 2 + self.planes], -1
        )
        parts = (firsts, self.runs[0]), (seconds, self.runs[2]), (rest, self.runs[1]), (more, self.runs[3])
        in_planes = jnp.concatenate([part[..., :size] for part, (_, size, _) in parts], axis=-1)
        return from_planes(in_planes, self.own_planes, self.rotation)


def check(tokens: Tokens, interpret: bool) -> None:
    """Raise ValueError, naming it, for what the kernels do not support."""
    wish = (None if interpret else needs()) or unsupported(tokens)
    if wish is not None:
        raise ValueError(f"implementation='mosaic_gpu' {wish}")


def refuses(tokens: Tokens) -> str | None:
    """What keeps these inputs from it on this process's devices; None: nothing."""
    return needs() or unsupported(tokens)


def needs() -> str | None:
    """What the kernels want of this process's devices, and what it got; None: nothing."""
    capability = _capability()
    if capability == "9.0":
        return None
    found = jax.default_backend() if capability is None else f"a GPU of compute capability {capability}"
    return f"needs a Hopper GPU (compute capability 9.0), not {found}"


def _capability() -> str | None:
    """Of the first GPU; None: there is none."""
    if jax.default_backend() != "gpu":
        return None
    return getattr(jax.local_devices()[0], "compute_capability", "unknown")


def unsupported(tokens: Tokens) -> str | None:
    """What the kernel wants of these shapes and dtypes, and what it got; None: nothing."""
    rank, d_state, width = tokens.q_BLRGN.shape[2], tokens.q_BLRGN.shape[-1], tokens.v_BLHP.shape[-1]
    planes = planes_of(tokens)
    if tokens.log_a_BLH.dtype != jnp.float32:
        return f"computes in float32, log_a is {tokens.log_a_BLH.dtype}"
    dtype = product_dtype(tokens)
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
