"""Causal softmax attention over the tokens of each query's own document: in plain XLA, and by cuDNN."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec

from mamba3_jax.ops import context as contexts
from mamba3_jax.ops.context import Context
from mamba3_jax.ops.einsum import einsum
from mamba3_jax.ops.sharded import Axes, size_of, undivided
from mamba3_jax.ops.tuned import device

IMPLEMENTATIONS = ("cudnn", "plain")
QUERIES = 256  # plain attention computes the scores of so many queries at a time
WIDTH = 128  # the widest heads that cuDNN takes on every GPU
# "" chooses plain attention for rows shorter than SHORT tokens, where launches dominate, and where the mask (B, L, L)
# would have more than MASK bytes.
SHORT, MASK = 128, 2**30


def rows(
    q_BLHE,
    k_BLKE,
    v_BLKE,
    first_BL=None,
    implementation: str = "",
    split: tuple = (None, None),
    context: Context | None = None,
):
    """y_t = sum_s softmax_s(q_t k_s / sqrt(E)) v_s over the tokens first_t <= s <= t of whole rows.

    Query head h reads the keys and values of head h // (H / K). No value and no gradient crosses to another document.

    Args:
        q_BLHE: queries.
        k_BLKE: keys; K divides H.
        v_BLKE: values.
        first_BL: the place of the first token of each token's document; None: every row is one document.
        implementation: "plain", "cudnn", or "" for cuDNN where it can run and is worth it (`choose`). cuDNN sums the
            gradients of queries in any order, unless XLA is told otherwise (--xla_gpu_deterministic_ops=true).
        split: the mesh axes (`jax.set_mesh`) that rows and heads are split over; each may be None.
        context: how the tokens lie over the mesh; None: rows are whole. With a context every device gathers the keys
            and values of whole rows, and computes no scores of its queries with later runs of keys.

    Raises:
        ValueError: cuDNN is named and cannot run this here.
    """
    if context is not None:
        if implementation == "cudnn":
            raise ValueError(f"attn_implementation='cudnn' does not run over {context}, wanted '' or 'plain'")
        if first_BL is None:
            first_BL = jnp.zeros(q_BLHE.shape[:2], jnp.int32)
        function = functools.partial(_over_runs, context)
        (y_BLHE,) = contexts.over(context, function, (q_BLHE, k_BLKE, v_BLKE, first_BL), (True,) * 4, (True,))
        return y_BLHE
    chosen = choose(implementation, q_BLHE, first_BL is not None)
    if chosen == "cudnn":
        return over_mesh(cudnn, *split)(q_BLHE, k_BLKE, v_BLKE, first_BL)
    place_BL = jnp.broadcast_to(jnp.arange(q_BLHE.shape[1]), q_BLHE.shape[:2])
    return attend(q_BLHE, k_BLKE, v_BLKE, jnp.zeros_like(place_BL) if first_BL is None else first_BL, place_BL)


def choose(implementation: str, q_BLHE, packed: bool) -> str:
    """Return the named implementation; for "", cuDNN where it can run, rows are not short and no mask is too large.

    Raises:
        ValueError: cuDNN is named and cannot run this here.
    """
    wish = unavailable() or unsupported(q_BLHE, packed)
    if implementation == "cudnn" and wish:
        raise ValueError(f"attn_implementation='cudnn' {wish}")
    batch, length = q_BLHE.shape[:2]
    mask = batch * length**2 * q_BLHE.dtype.itemsize if packed else 0
    return implementation or ("plain" if wish or length < SHORT or mask > MASK else "cudnn")


def unavailable() -> str | None:
    """Return what cuDNN needs of the device that the traced program is for, and what that is; None: it can run."""
    target = device()
    if "NVIDIA" not in target.device_kind:
        return f"needs an NVIDIA GPU, not {target.device_kind!r}"
    if float(getattr(target, "compute_capability", 0)) < 8:  # a device of another process does not say it
        return f"needs an NVIDIA GPU of this process from Ampere on, not {target.device_kind!r}"
    return None


def unsupported(q_BLHE, packed: bool) -> str | None:
    """Return what cuDNN wants of the queries' shape and dtype, and what they are; None: it takes them."""
    length, width = q_BLHE.shape[1], q_BLHE.shape[3]
    if q_BLHE.dtype != jnp.bfloat16:
        return f"computes in bfloat16, not {q_BLHE.dtype}"
    if width % 8 or width > WIDTH:
        return f"wants attn_head_dim a multiple of 8 up to {WIDTH}, not {width}"
    if packed and length % 2:
        return f"wants rows of documents to have an even number of tokens, not {length}"
    return None


def cudnn(q_BLHE, k_BLKE, v_BLKE, first_BL):
    """Compute `rows` by cuDNN's fused kernels, which do not store the scores.

    Documents are a mask (B, 1, L, L) that cuDNN adds to the scores as a bias of -2^41, so that weights outside of the
    document are exactly 0. It skips keys after the query. The mask is the same for all layers, which share it. (cuDNN
    can pack documents without a mask, but jax's way to that is private, needs a static bound on the number of documents
    in a row, stores the softmax's sums once for each of them, and takes no grouped heads.)
    """
    mask = None
    if first_BL is not None:
        mask = (jnp.arange(k_BLKE.shape[1]) >= first_BL[..., None])[:, None]
    # A boolean mask has no gradient; jax 0.10.2 lets cuDNN compute one nevertheless (jax-ml/jax#39512).
    return jax.nn.dot_product_attention(q_BLHE, k_BLKE, v_BLKE, mask=mask, is_causal=True, implementation="cudnn")


def over_mesh(attention, batch: Axes, heads: str | None):
    """Return a function that runs `attention(q, k, v, first)` on each device's rows and heads; without a mesh, itself.

    XLA is not left to divide these kernels: jax can do so only where queries, keys and values are split alike.
    """
    if undivided(batch, heads):
        return attention

    def call(q_BLHE, k_BLKE, v_BLKE, first_BL):
        row = None if q_BLHE.shape[0] % size_of(batch) else batch
        by = Spec(row, None, heads)
        specs = (by, by, by, None if first_BL is None else Spec(row))
        return jax.shard_map(attention, in_specs=specs, out_specs=by, check_vma=False)(q_BLHE, k_BLKE, v_BLKE, first_BL)

    return call


def attend(q_BLHE, k_BTKE, v_BTKE, first_BL, last_BL):
    """y = softmax(q k^T / sqrt(E)) v over the tokens first <= t <= last of each query; scores and softmax in float32.

    Query head h reads kv head h // (H / K). Scores exist for `QUERIES` queries at a time and are computed again in the
    backward pass, so they take QUERIES x T numbers for each head, not L x T. (jax.nn.dot_product_attention takes the
    same masks, but on CPU and TPU it stores all L x T scores.)
    """
    grouped = q_BLHE.reshape(*q_BLHE.shape[:2], k_BTKE.shape[2], -1, q_BLHE.shape[3])
    y_BLGKE = _attend(jnp.swapaxes(grouped, 2, 3), k_BTKE, v_BTKE, first_BL, last_BL)
    return jnp.swapaxes(y_BLGKE, 2, 3).reshape(q_BLHE.shape)


def _attend(q_BLGKE, k_BTKE, v_BTKE, first_BL, last_BL):
    """Compute `attend` with query heads on two axes: G of them for each kv head K."""
    dtype = v_BTKE.dtype
    times_T = jnp.arange(k_BTKE.shape[1])

    def block(q_BLGKE, first_BL, last_BL):
        scores = einsum("blgke,btke->bgklt", q_BLGKE, k_BTKE, dtype=dtype, out=jnp.float32)
        seen_BLT = (times_T >= first_BL[..., None]) & (times_T <= last_BL[..., None])
        scores = jnp.where(seen_BLT[:, None, None], scores * q_BLGKE.shape[-1] ** -0.5, -jnp.inf)
        return einsum("bgklt,btke->blgke", jax.nn.softmax(scores), v_BTKE, dtype=dtype)

    return _by_queries(block, q_BLGKE, first_BL, last_BL)


def _over_runs(context: Context, q_BLHE, k_BLKE, v_BLKE, first_BL):
    """Compute `rows` of this device's queries."""
    runs = context.runs * jax.lax.axis_size(context.axis)
    k_ZBTKE, v_ZBTKE = (
        jnp.moveaxis(x.reshape(x.shape[0], runs, -1, *x.shape[2:]), 1, 0)
        for x in (contexts.gather(context, k_BLKE), contexts.gather(context, v_BLKE))
    )
    q_BLKGE = q_BLHE.reshape(*q_BLHE.shape[:2], k_BLKE.shape[2], -1, q_BLHE.shape[3])
    queries = contexts.fold(context, (jnp.swapaxes(q_BLKGE, 2, 3), first_BL))
    results = []
    for place, (q_BLGKE, first_BL) in enumerate(contexts.apart(context, queries)):
        results.append(_up_to(context.run(place), q_BLGKE, k_ZBTKE, v_ZBTKE, first_BL))
    y_BLGKE = jnp.concatenate(results, axis=1)
    return (jnp.swapaxes(y_BLGKE, 2, 3).reshape(q_BLHE.shape),)


def _up_to(run, q_BLGKE, k_ZBTKE, v_ZBTKE, first_BL):
    """Compute `rows` for the queries of one run from the keys of all Z runs, one run of keys after the other.

        y = sum_t exp(score_t - m) v_t / sum_t exp(score_t - m)

    m is the largest score so far. y does not depend on it, so it has no gradient. Runs of keys that come after the
    queries' are skipped.
    """
    dtype, scale = v_ZBTKE.dtype, q_BLGKE.shape[-1] ** -0.5
    n_runs, length = k_ZBTKE.shape[0], k_ZBTKE.shape[2]
    last_BL = jnp.broadcast_to(run * length + jnp.arange(length), first_BL.shape)

    def block(q_BLGKE, first_BL, last_BL):
        def add(carry, place, k_BTKE, v_BTKE):
            m_BGKL, sum_BGKL, y_BGKLE = carry
            scores = einsum("blgke,btke->bgklt", q_BLGKE, k_BTKE, dtype=dtype, out=jnp.float32) * scale
            times_T = place * length + jnp.arange(length)
            seen_BLT = (times_T >= first_BL[..., None]) & (times_T <= last_BL[..., None])
            scores = jnp.where(seen_BLT[:, None, None], scores, -jnp.inf)
            larger_BGKL = jax.lax.stop_gradient(jnp.maximum(m_BGKL, jnp.max(scores, axis=-1)))
            weights, decay_BGKL = jnp.exp(scores - larger_BGKL[..., None]), jnp.exp(m_BGKL - larger_BGKL)
            added_BGKLE = einsum("bgklt,btke->bgkle", weights, v_BTKE, dtype=dtype, out=jnp.float32)
            sum_BGKL = decay_BGKL * sum_BGKL + jnp.sum(weights, axis=-1)
            return larger_BGKL, sum_BGKL, decay_BGKL[..., None] * y_BGKLE + added_BGKLE

        def step(carry, part):
            return jax.lax.cond(part[0] <= run, add, lambda carry, *_: carry, carry, *part), None

        batch, length_, groups, kv_heads, width = q_BLGKE.shape
        nothing = jnp.zeros((batch, groups, kv_heads, length_, width), jnp.float32)
        lowest = jnp.full(nothing.shape[:-1], jnp.finfo(jnp.float32).min)  # finite, so that m - m is 0 and not NaN
        carry = lowest, jnp.zeros_like(lowest), nothing
        (_, sum_BGKL, y_BGKLE), _ = jax.lax.scan(step, carry, (jnp.arange(n_runs), k_ZBTKE, v_ZBTKE))
        return jnp.moveaxis(y_BGKLE / sum_BGKL[..., None], 3, 1).astype(dtype)

    return _by_queries(block, q_BLGKE, first_BL, last_BL)


def _by_queries(block, q_BLGKE, first_BL, last_BL):
    """Run `block(q, first, last)` on `QUERIES` queries at a time, and again in the backward pass."""
    length = q_BLGKE.shape[1]
    if length <= QUERIES:
        return block(q_BLGKE, first_BL, last_BL)

    def blocks(x):  # (B, L, ...) -> (blocks, B, QUERIES, ...); the padding sees token 0
        x = jnp.pad(x, ((0, 0), (0, -length % QUERIES), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, QUERIES, *x.shape[2:]), 1, 0)

    block = jax.checkpoint(block, prevent_cse=False)  # in a loop XLA has nothing to merge it with
    y = jax.lax.map(lambda arrays: block(*arrays), tuple(map(blocks, (q_BLGKE, first_BL, last_BL))))
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]
