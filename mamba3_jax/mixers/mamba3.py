"""The Mamba-3 mixer, SISO and MIMO: parameters and per-token quantities around `ops.ssm` (SPEC sections 2 to 10)."""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mamba3_jax.config import ModelConfig
from mamba3_jax.mixers import choices
from mamba3_jax.mixers.choices import ANGLES, BIASED, pairing, sizes
from mamba3_jax.mixers.mixer import Mixer, both
from mamba3_jax.mixers.official import Piece, Row, same, weight
from mamba3_jax.mixers.rates import A_FORMS, A_RANGE
from mamba3_jax.mixers.short_convolution import Window, channels, convolution_flops, convolved, empty_window, taps_of
from mamba3_jax.nn.initial import inverse_softplus_dt, linear, log_uniform
from mamba3_jax.nn.norm import rms_norm
from mamba3_jax.nn.precision import DTYPES
from mamba3_jax.ops import quaternion
from mamba3_jax.ops.context import Context
from mamba3_jax.ops.discretize import DISCRETIZATIONS, uses_previous
from mamba3_jax.ops.einsum import einsum
from mamba3_jax.ops.quaternion import Quaternion
from mamba3_jax.ops.ssm import Heads, State, Tokens
from mamba3_jax.ops.state import per_head


class Carried(NamedTuple):
    """What a sequence leaves behind: the op's state, and what a convolution or quaternions add to it."""

    ssm: State | None
    window: Window | None = None  # of the convolution; None: there is none
    rotation: Quaternion | None = None  # the running product, parts (B, H, S); None: no quaternions


def opened(state: State | Carried | None) -> Carried:
    """Return the parts of a layer's state; None is the empty state."""
    return state if isinstance(state, Carried) else Carried(ssm=state)


def closed(carried: Carried) -> State | Carried:
    """Return the layer's state of these parts: the op's own state if there is nothing else."""
    return carried.ssm if carried.window is None and carried.rotation is None else carried


class Mamba3(Mixer):
    """y, state = Mamba-3(x, state, start): in-projections, `ops.ssm`, out-projection.

    The in-projection is three parameters, so that tensor parallelism can shard what is per head (in_zx, in_dt_a_trap)
    and replicate what heads share (in_kq_angle, whose columns are k, q, theta: the paper's B, C, angle). Ablations keep
    all of these matrices, so that variants differ in nothing else; columns that a variant does not use have a gradient
    of zero. Biases and norms of k and q, a_log and the convolution exist only where they are used.
    """

    letter = "M"
    matrices = ("in_zx", "in_dt_a_trap", "in_kq_angle", "out")
    splits_rows = True
    official: ClassVar = {
        "discretization": "exponential_trapezoidal",
        "angles": "data",
        "pairing": "",
        "bc_bias": "both",
        "bc_norm": True,
        "conv": 0,
        "a_form": "heavy_tail",
    }

    def setup(self):
        config, size = self.config, sizes(self.config)
        d_model, (heads, width) = config.d_model, (size.heads, size.head_dim)
        columns = 2 * size.rank * size.groups * size.d_state + size.thetas
        ones, into = nn.initializers.ones, linear(d_model)
        out = linear(heads * width, len(config.pattern) ** -0.5)
        dt = inverse_softplus_dt(config.dt_min, config.dt_max, config.dt_init_floor)

        self.in_zx = self.named("in_zx", into, embed=d_model, pair=2, heads=heads, head_dim=width)
        self.in_dt_a_trap = self.named("in_dt_a_trap", into, embed=d_model, pair=3, heads=heads)
        self.in_kq_angle = self.named("in_kq_angle", into, embed=d_model, shared=columns)
        self.dt_bias = self.named("dt_bias", dt, heads=heads)
        self.biases = {name: self.bias(name) for name in BIASED[config.bc_bias]}
        if config.bc_norm:
            self.k_norm = self.named("k_norm", ones, state=size.d_state)
            self.q_norm = self.named("q_norm", ones, state=size.d_state)
        self.skip = self.named("skip", ones, heads=heads)
        if size.mimo:
            mean = nn.initializers.constant(1 / size.rank)
            self.v_rank = self.named("v_rank", mean, heads=heads, rank=size.rank, head_dim=width)
            self.gate_rank = self.named("gate_rank", ones, heads=heads, rank=size.rank, head_dim=width)
            self.out_rank = self.named("out_rank", mean, heads=heads, rank=size.rank, head_dim=width)
        if config.out_norm:
            self.norm = self.named("norm", ones, heads=heads, head_dim=width)
        self.out = self.named("out", out, heads=heads, head_dim=width, embed=d_model)
        if config.a_form == "learned":
            self.a_log = self.named("a_log", log_uniform(*A_RANGE), heads=heads)
        if config.conv:
            self.taps = taps_of(self, config.conv, **channels(config, size.rank))

    def bias(self, name: str):
        """Return a bias of keys or queries. A frozen one gets no gradient, so it stays: biases have no weight decay."""
        config, size = self.config, sizes(self.config)
        initial = nn.initializers.constant(config.bc_bias_initial)
        bias_HRN = self.named(name, initial, heads=size.heads, rank=size.rank, state=size.d_state)
        return jax.lax.stop_gradient(bias_HRN) if config.bc_bias_frozen else bias_HRN

    def __call__(self, x_BLD, state: State | Carried | None = None, start_BL=None):
        before, context = opened(state), self.context(x_BLD, state)
        tokens, after = self.tokens(x_BLD, start_BL, before, context)
        y_BLHP, ssm = self.op(pairing(self.config), context)(tokens, self.heads(), before.ssm)
        y_BLD = einsum("blhp,hpd->bld", y_BLHP, self.out, dtype=DTYPES[self.config.compute_dtype])
        return y_BLD, closed(after._replace(ssm=ssm))

    def tokens(self, x_BLD, start_BL, before: Carried, context: Context | None) -> tuple[Tokens, Carried]:
        """Compute what the op needs of each token (SPEC sections 2 and 3, and the norm of 4).

        Returns:
            The op's tokens, and what they leave behind, without the op's state.
        """
        config, size, dtype = self.config, sizes(self.config), DTYPES[self.config.compute_dtype]
        # Project to what heads share first. The backward pass then adds the gradients of x from the per-head
        # projections to one another, and XLA sums them over the devices of tensor parallelism once.
        kq_angle = einsum("bld,de->ble", x_BLD, self.in_kq_angle, dtype=dtype, out=jnp.float32)
        gate_BLHP, v_BLHP = both(x_BLD, self.in_zx, dtype)
        dt_a_trap = einsum("bld,dch->blch", x_BLD, self.in_dt_a_trap, dtype=dtype, out=jnp.float32)

        dt_BLH = jax.nn.softplus(dt_a_trap[:, :, 0] + self.dt_bias)
        a_log_H = self.a_log if config.a_form == "learned" else None
        a_BLH = -jnp.maximum(A_FORMS[config.a_form](dt_a_trap[:, :, 1], a_log_H), config.a_floor)
        kq_BLE, theta_BLS = jnp.split(kq_angle, [kq_angle.shape[-1] - size.thetas], axis=-1)
        window = None
        if config.conv:
            inputs = v_BLHP, kq_BLE.astype(dtype), before.window, start_BL
            v_BLHP, kq_BLE, window = convolved(self.taps, *inputs, context)
        k_BLRGN, q_BLRGN = self.keys_and_queries(kq_BLE)
        rotation = step = None
        if config.angles == "quaternion":
            step = quaternion.exponential(quaternion.axis(theta_BLS), dt_BLH)
            running, rotation = quaternion.running(step, before.rotation, start_BL, context)
            k_BLRGN, q_BLRGN = self.rotated(k_BLRGN, "k_bias", running), self.rotated(q_BLRGN, "q_bias", running)
        log_a_BLH, gamma_BLH, beta_BLH = DISCRETIZATIONS[config.discretization](dt_BLH, a_BLH, dt_a_trap[:, :, 2])
        angle_BLHS = ANGLES[config.angles](theta_BLS, dt_BLH)
        self.observe(dt=dt_BLH, log_a=log_a_BLH, gamma=gamma_BLH, beta=beta_BLH, angle=angle_BLHS, step=step)
        tokens = Tokens(
            q_BLRGN=q_BLRGN.astype(dtype),
            k_BLRGN=k_BLRGN.astype(dtype),
            v_BLHP=v_BLHP,
            dt_BLH=None if angle_BLHS is None else dt_BLH,
            log_a_BLH=log_a_BLH,
            gamma_BLH=gamma_BLH,
            beta_BLH=beta_BLH,
            angle_BLHS=angle_BLHS,
            gate_BLHP=gate_BLHP,
            start_BL=start_BL,
        )
        return tokens, Carried(ssm=None, window=window, rotation=rotation)

    def keys_and_queries(self, kq_BLE):
        """Return keys and queries of every group before bias and rotation, with bc_norm after their norm."""
        size = sizes(self.config)
        kq = kq_BLE.reshape(*kq_BLE.shape[:2], 2, size.rank, size.groups, size.d_state)
        if not self.config.bc_norm:
            return kq[:, :, 0], kq[:, :, 1]
        return rms_norm(kq[:, :, 0], self.k_norm), rms_norm(kq[:, :, 1], self.q_norm)

    def rotated(self, x_BLRGN, bias: str, running: Quaternion):
        """Return keys or queries of every head, biased and rotated by the running products of quaternions."""
        x_BLHRN = per_head(x_BLRGN.astype(jnp.float32), sizes(self.config).heads)
        x_BLHRN = x_BLHRN + self.biases.get(bias, 0)
        return jnp.swapaxes(quaternion.rotate(x_BLHRN, jax.tree.map(lambda x: x[..., None, :], running)), 2, 3)

    def heads(self) -> Heads:
        """Return the learned arrays of the op."""
        size = sizes(self.config)
        biases = {} if self.config.angles == "quaternion" else self.biases  # `tokens` added them before it rotated
        return Heads(
            q_bias_HRN=biases.get("q_bias"),
            k_bias_HRN=biases.get("k_bias"),
            skip_H=self.skip,
            v_rank_HRP=self.v_rank if size.mimo else None,
            gate_rank_HRP=self.gate_rank if size.mimo else None,
            out_rank_HRP=self.out_rank if size.mimo else None,
            norm_HP=self.norm if self.config.out_norm else None,
        )

    @staticmethod
    def empty_state(config: ModelConfig, batch: int, capacity: int) -> State | Carried:
        """Return zeros, and no rotation; `capacity` has no meaning for a state of fixed size."""
        size, dtype = sizes(config), DTYPES[config.compute_dtype]
        turns, looks_back = config.angles in ("data", "rope"), uses_previous(config.discretization)
        ssm = State(
            angle_BHS=jnp.zeros((batch, size.heads, size.planes), jnp.float32) if turns else None,
            ssm_BHPN=jnp.zeros((batch, size.heads, size.head_dim, size.d_state), jnp.float32),
            k_BRHN=jnp.zeros((batch, size.rank, size.heads, size.d_state), dtype) if looks_back else None,
            v_BHP=jnp.zeros((batch, size.heads, size.head_dim), dtype) if looks_back else None,
        )
        window = empty_window(config.conv, batch, dtype, **channels(config, size.rank)) if config.conv else None
        rotation = quaternion.identity((batch, size.heads, size.planes)) if config.angles == "quaternion" else None
        return closed(Carried(ssm=ssm, window=window, rotation=rotation))

    check = staticmethod(choices.check)

    @staticmethod
    def memory(state: State | Carried):
        """Return h."""
        return opened(state).ssm.ssm_BHPN

    @staticmethod
    def state_flops(config: ModelConfig, length: int) -> float:
        """Count 2 H P N R FLOPs to write the state and as many to read it, and the convolution's."""
        size = sizes(config)
        state = 4 * size.heads * size.head_dim * size.d_state * size.rank
        return state + convolution_flops(config.conv, **channels(config, size.rank))

    @staticmethod
    def fused(config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Return the widths of k, q and theta."""
        size = sizes(config)
        shared = size.rank * size.groups * size.d_state
        return {"in_kq_angle": (shared, shared, size.thetas)}

    @staticmethod
    def official_rows(config: ModelConfig) -> dict[str, Row]:
        """Return where the official tensors of a Mamba-3 layer lie (SPEC section 10)."""
        width, size = config.d_model, sizes(config)
        heads, head_dim, ranks, state, planes = size.heads, size.head_dim, size.rank, size.d_state, size.planes
        inner, shared = heads * head_dim, 2 * ranks * size.groups * state
        kq_angle = (width, shared + planes)
        rows = {
            "dt_bias": same("dt_bias", (heads,)),
            "B_bias": same("k_bias", (heads, ranks, state)),
            "C_bias": same("q_bias", (heads, ranks, state)),
        }
        if size.mimo:
            per_rank = {"mimo_x": "v_rank", "mimo_z": "gate_rank", "mimo_o": "out_rank"}
            rows |= {name: same(ours, (heads, ranks, head_dim)) for name, ours in per_rank.items()}
        rows |= {
            "D": same("skip", (heads,)),
            "in_proj.weight": weight(
                width,
                2 * inner + shared + 3 * heads + planes,
                Piece("in_zx", (width, 2, heads, head_dim)),
                Piece("in_kq_angle", kq_angle, slice(0, shared)),
                Piece("in_dt_a_trap", (width, 3, heads)),
                Piece("in_kq_angle", kq_angle, slice(shared, None)),
            ),
            "B_norm.weight": same("k_norm", (state,)),
            "C_norm.weight": same("q_norm", (state,)),
        }
        if config.out_norm:
            rows["norm.weight"] = same("norm", (heads, head_dim), (inner,))
        return rows | {"out_proj.weight": weight(inner, width, Piece("out", (heads, head_dim, width)))}
