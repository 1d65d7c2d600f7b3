"""Sampling from a model: prefill in pieces, then a decode loop that stays on the device."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mamba3_jax import decoding, memory
from mamba3_jax.config import ModelConfig
from mamba3_jax.model import LanguageModel
from mamba3_jax.prompts import check, padded
from mamba3_jax.sampling import Sampling, draw

# How many tokens of a row one piece of the prefill has, where the caller does not say. On an accelerator, as many as
# fit into memory: at least PREFILL, and at most PREFILL_MOST over all rows, past which speed hardly grows. On a CPU,
# PREFILL: pieces that fit into its caches are faster.
PREFILL, PREFILL_MOST = 2048, 2**17
BLOCK = 32  # tokens that the loop decodes before the host searches them for a stop string
NOTHING, NO_NUMBER = -1, -2  # in place of a token


class Generated(NamedTuple):
    """What followed each prompt, and how long it took; the times of prefill and decode include no compilation."""

    ids: list[list[int]]  # one list for each prompt, without the stop token
    prefill_tokens: int  # of the prompts, without padding
    prefill_seconds: float
    decode_tokens: int  # steps times prompts: a prompt that has stopped counts for as long as others go on
    decode_seconds: float
    compile_seconds: float  # includes the time of preparing the parameters

    def __str__(self):
        prefill = self.prefill_tokens / max(self.prefill_seconds, 1e-9)
        decode = self.decode_tokens / max(self.decode_seconds, 1e-9)
        return (
            f"prefill {self.prefill_tokens} tokens, {prefill:,.0f} tokens/s; decode {self.decode_tokens} tokens, "
            f"{decode:,.0f} tokens/s (and {self.compile_seconds:.1f} s of compiling)"
        )


class Carry(NamedTuple):
    """The decode loop between two tokens."""

    step: jax.Array  # tokens written so far
    token_B: jax.Array  # the last one, which the model has not read yet
    start_B: jax.Array  # whether it is the first one of its document
    done_B: jax.Array
    out_BT: jax.Array  # the ids drawn; NOTHING where there is none, NO_NUMBER where the logits were NaN
    state: Any  # unstacked


@functools.lru_cache(maxsize=8)
def programs(fields: tuple[tuple, ...], sampling: Sampling, stop_ids: tuple[int, ...]):
    """Return the jitted (prefill, decode) of a model config, given by its fields, which can be hashed.

    Equal arguments return the same two objects, so that equal calls compile once.
    """
    config = ModelConfig(**dict(fields))
    run, loop = functools.partial(prefill, LanguageModel(config)), functools.partial(decode, config, sampling, stop_ids)
    return jax.jit(run, donate_argnums=3), jax.jit(loop, donate_argnums=2)


def prefill(model: LanguageModel, params, tokens_BL, start_BL, state):
    """Return the state after some more tokens of the prompts; no logits are computed."""
    return model.apply({"params": params}, tokens_BL, state, start_BL)[1]


def decode(config: ModelConfig, sampling: Sampling, stop_ids: tuple[int, ...], params, key, carry: Carry, until):
    """Draw tokens until `until` of them are written or every row is done. A row is done when it draws a stop id.

    Parameters are those that `decoding.prepare` returns.
    """

    def unfinished(carry: Carry):
        return (carry.step < until) & ~jnp.all(carry.done_B)

    def one(carry: Carry):
        logits_BV, state = decoding.step(config, params, carry.token_B, carry.state, carry.start_B)
        token_B = draw(jax.random.fold_in(key, carry.step), logits_BV, sampling)
        nan_B = holds_nan(logits_BV)
        done_B = carry.done_B | nan_B | jnp.isin(token_B, jnp.asarray(stop_ids, jnp.int32))
        out_B = jnp.where(nan_B, NO_NUMBER, jnp.where(done_B, NOTHING, token_B))
        out_BT = carry.out_BT.at[:, carry.step].set(out_B)
        return Carry(
            step=carry.step + 1,
            token_B=token_B,
            start_B=jnp.zeros_like(carry.start_B),
            done_B=done_B,
            out_BT=out_BT,
            state=state,
        )

    return jax.lax.while_loop(unfinished, one, carry)


def holds_nan(logits_BV):
    """Tell which rows hold NaN: their maximum is NaN. The draw needs the maximum too, so XLA reads the logits once."""
    return jnp.isnan(jnp.max(logits_BV, axis=-1))


def generate(
    model: LanguageModel,
    params,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    stop: Callable[[list[int]], bool] | None = None,
    prefill_length: int | None = None,
    padded_to: int = 1,
) -> Generated:
    """Continue prompts of any lengths together.

    Prompts are padded on the left to the length of the longest. `start` at the first token of a prompt keeps the
    padding out of its state exactly. The prefill runs all tokens of the prompts but the last, in pieces of at most
    `prefill_length`; the decode loop begins with the last one.

    Args:
        model: a `LanguageModel`.
        params: its parameters.
        prompts: ids, at least one in each prompt: a list of lists or of 1-D arrays of integers, or one array (B, L).
        tokens: the most tokens to draw for each prompt.
        sampling: temperature, top_k and top_p; None is `Sampling()`.
        seed: of the draws. Equal seeds draw equal tokens.
        stop_ids: a row ends when it draws one of these.
        stop: a function of the tokens that a row has drawn, called every `BLOCK` tokens. The row is cut after the first
            token at which it returns True.
        prefill_length: the most tokens of a row in one piece of the prefill, which bounds its memory; None: see
            `PREFILL`.
        padded_to: the least length of a row, with its padding: calls whose prompts are no longer than this have the
            same shape.

    Raises:
        ValueError: no prompt or an empty one, something that is not an id of the vocabulary, a number out of its range,
            or not enough memory. It is raised before anything is compiled.
        FloatingPointError: the model's logits are NaN.
    """
    sampling = sampling or Sampling()
    prompts, stop_ids = check(model, prompts, tokens, sampling, stop_ids, prefill_length, params)
    config, seconds = model.config, {"prefill": 0.0, "decode": 0.0, "compile": 0.0}
    fields = tuple((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    prefill_program, decode_program = programs(fields, sampling, tuple(stop_ids))
    if max(padded_to, *map(len, prompts)) > 1:
        carry = prefilled(prefill_program, model, params, prompts, tokens, prefill_length, padded_to, seconds)
    else:
        tokens_BL, start_BL, _ = padded(prompts, 1)
        state = LanguageModel(config, stacked=False).empty_state(len(prompts), 1 + tokens)
        carry = first_carry(tokens_BL, start_BL, tokens, state)
    key = jax.random.key(seed)
    with timed(seconds, "compile"):
        params = jax.block_until_ready(decoding.prepare(config, params))
        loop = decode_program.lower(params, key, carry, jnp.int32(0)).compile()
    rows, steps = decoded(functools.partial(loop, params, key), carry, tokens, stop, seconds)
    return Generated(
        ids=rows,
        prefill_tokens=sum(map(len, prompts)) - len(prompts),
        prefill_seconds=seconds["prefill"],
        decode_tokens=len(prompts) * steps,
        decode_seconds=seconds["decode"],
        compile_seconds=seconds["compile"],
    )


def prefilled(
    program,
    model: LanguageModel,
    params,
    prompts: list[list[int]],
    tokens: int,
    prefill_length: int | None,
    padded_to: int,
    seconds: dict[str, float],
) -> Carry:
    """Run all but the last token of each prompt, piece by piece; return what a decode loop of `tokens` begins with."""
    with timed(seconds, "compile"):
        compile_prefill = functools.partial(compiled_prefill, program, model, params, tokens)
        held = memory.on_a_device(params)
        run, tokens_BL, start_BL, piece = fitting(compile_prefill, prompts, prefill_length, held, padded_to)
    state = model.empty_state(len(prompts), tokens_BL.shape[1] + tokens)
    with timed(seconds, "prefill"):
        for first in range(0, tokens_BL.shape[1] - 1, piece):
            part = slice(first, first + piece)
            state = run(params, tokens_BL[:, part], start_BL[:, part], state)
        jax.block_until_ready(state)
    with timed(seconds, "compile"):
        state = jax.block_until_ready(jax.jit(functools.partial(decoding.unstacked, model.config))(state))
    return first_carry(tokens_BL, start_BL, tokens, state)


def first_carry(tokens_BL, start_BL, tokens: int, state) -> Carry:
    """Return what the decode loop begins with: the last token of each row, the state before it, room for `tokens`."""
    batch = len(tokens_BL)
    return Carry(
        step=jnp.int32(0),
        token_B=jnp.asarray(tokens_BL[:, -1]),
        start_B=jnp.asarray(start_BL[:, -1]),
        done_B=jnp.zeros(batch, bool),
        out_BT=jnp.full((batch, tokens), NOTHING, jnp.int32),
        state=state,
    )


def decoded(
    loop: Callable,
    carry: Carry,
    tokens: int,
    stop: Callable[[list[int]], bool] | None,
    seconds: dict[str, float],
) -> tuple[list[list[int]], int]:
    """Run the loop, (carry, until) -> carry, to its end; return what each row has drawn, and the number of steps."""
    block, rows, searched = BLOCK if stop else tokens, [], [0] * len(carry.token_B)
    for until in range(block, tokens + block, block):
        with timed(seconds, "decode"):
            carry = jax.block_until_ready(loop(carry, jnp.int32(min(until, tokens))))
        rows = drawn(carry.out_BT)
        if stop:
            held = [stop(row) for row in rows]
            searched = [at if found else len(row) for at, found, row in zip(searched, held, rows, strict=True)]
            carry = carry._replace(done_B=carry.done_B | jnp.asarray(held))
        if bool(jnp.all(carry.done_B)):
            break
    if stop:
        rows = [cut(row, stop, at) for row, at in zip(rows, searched, strict=True)]
    return rows, int(carry.step)


def compiled_prefill(program, model: LanguageModel, params, tokens: int, tokens_BL, start_BL, piece: int):
    """Compile the prefill of one piece, with room in the state for the whole rows and `tokens` more."""
    batch, length = tokens_BL.shape
    state = jax.eval_shape(lambda: model.empty_state(batch, length + tokens))
    return program.lower(params, tokens_BL[:, :piece], start_BL[:, :piece], state).compile()


def fitting(compile_prefill: Callable, prompts, prefill_length: int | None, held: int, padded_to: int = 1):
    """Return the compiled prefill, tokens_BL, start_BL and the length of a piece: the given one, or what fits.

    The compiler plans all memory that a piece needs, of which `held` bytes are allocated already. Pieces become shorter
    until the rest fits, or until they have `PREFILL` tokens.
    """
    most = prefill_length or PREFILL
    if not prefill_length and jax.default_backend() != "cpu":
        most = max(PREFILL, PREFILL_MOST // len(prompts))
    while True:
        tokens_BL, start_BL, piece = padded(prompts, most, padded_to)
        run = compile_prefill(tokens_BL, start_BL, piece)
        needed, free = memory.of_program(run) - held, memory.free_on_device()
        if prefill_length or piece <= PREFILL or free is None or needed <= free:
            return run, tokens_BL, start_BL, piece
        # Shrink in proportion to what is missing, and at least by half, so that the search ends soon.
        most = max(PREFILL, min(piece // 2, int(piece * free / needed)))


@contextlib.contextmanager
def timed(seconds: dict[str, float], what: str):
    """Add the seconds that the body takes to the entry `what`."""
    begin = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - begin


def drawn(out_BT) -> list[list[int]]:
    """Return what each row has drawn. Raise FloatingPointError if logits were NaN."""
    out_BT = np.asarray(out_BT)
    if (out_BT == NO_NUMBER).any():
        raise FloatingPointError(
            "the model's logits are not numbers: its parameters are not finite, or its state is not"
        )
    return [[int(token) for token in row if token != NOTHING] for row in out_BT]


def cut(row: list[int], stop: Callable[[list[int]], bool], searched: int) -> list[int]:
    """Return the shortest beginning of the row, longer than `searched`, for which `stop` holds; or else all of it."""
    return next((row[:end] for end in range(searched + 1, len(row) + 1) if stop(row[:end])), row)
