"""Score every token of held-out rows of any length, in memory that does not grow with the length."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mamba3_jax.config import DataConfig
from mamba3_jax.data import Batch, loader
from mamba3_jax.model import LanguageModel
from mamba3_jax.ops.cross_entropy import scores


class Scored(NamedTuple):
    """A batch and how well the model predicts it."""

    batch: Batch
    # With several members, nll and correct have a leading axis M.
    nll_BL: np.ndarray  # -log p(target) in nats; NaN for a target outside the vocabulary
    correct_BL: np.ndarray  # the likeliest id is the target
    position_BL: np.ndarray  # tokens since the document's first, or the row's
    bytes_BL: np.ndarray | None = None  # how many bytes of text the target spells; None: the data are no text

    def of(self, member: int) -> "Scored":
        """Return the scores of one of several members."""
        return self._replace(nll_BL=self.nll_BL[member], correct_BL=self.correct_BL[member])


def score_piece(model: LanguageModel, params, piece: Batch, state):
    """Return (nll, correct, state) of a piece of rows; as in training, over the padded vocabulary, and NaN outside."""
    logits_BLV, state = model.apply({"params": params}, piece.tokens_BL, state, piece.start_BL)
    found = scores(logits_BLV, piece.targets_BL, model.config.vocab_size)
    return found.nll_BL, found.correct_BL, state


def positions(start_BL: np.ndarray) -> np.ndarray:
    """Return, for each token, how many tokens of its document stand before it in its row."""
    place_BL = np.broadcast_to(np.arange(start_BL.shape[1]), start_BL.shape)
    return place_BL - np.maximum.accumulate(np.where(start_BL, place_BL, 0), axis=1)


class Scorer:
    """Scores rows of one length; `score` may be called on any number of datasets, compiling once."""

    def __init__(self, model: LanguageModel, params, piece: int, members: int = 0):
        """Set up the scoring of a model.

        Args:
            model: a `LanguageModel`.
            params: its parameters.
            piece: tokens that one call runs; longer rows run in pieces, with the state carried.
            members: how many models are scored at once, along the leading axis of `params`; 0: one, without that axis.
        """
        self.model, self.params, self.piece, self.members = model, params, piece, members
        run = functools.partial(score_piece, model)
        self._run = jax.jit(jax.vmap(run, in_axes=(0, None, 0)) if members else run, donate_argnums=2)

    def batch(self, batch: Batch) -> Scored:
        """Score one batch of any length; the last piece is filled up with tokens that are not scored."""
        rows, length = batch.tokens_BL.shape
        piece = min(self.piece, length)
        fill = -length % piece
        padded = jax.tree.map(lambda array_BL: np.pad(array_BL, ((0, 0), (0, fill))), batch)
        state, parts = self._empty_state(rows, length + fill), []
        for first in range(0, length, piece):
            part = jax.tree.map(lambda array_BL: array_BL[:, first : first + piece], padded)  # noqa: B023
            *scores, state = self._run(self.params, part, state)
            parts.append(jax.device_get(scores))
        nll_BL, correct_BL = (np.concatenate(part, axis=-1)[..., :length] for part in zip(*parts, strict=True))
        return Scored(batch, nll_BL, correct_BL, positions(batch.start_BL))

    def _empty_state(self, rows: int, length: int):
        state = self.model.empty_state(rows, length)
        return jax.tree.map(lambda x: jnp.stack([x] * self.members), state) if self.members else state

    def score(
        self, data: DataConfig, *, max_tokens: int = 0, say: Callable[[str], None] | None = None
    ) -> Iterator[Scored]:
        """Yield scored batches of the "valid" split with about `max_tokens` tokens in all (0: the whole split).

        With several processes, each scores a part of a batch's rows and yields all of them. `say` gets a line of
        progress now and then.
        """
        host = (jax.process_index(), jax.process_count())
        rows = min(data.batch, max_tokens // data.length) if max_tokens else data.batch
        data = dataclasses.replace(data, batch=max(1, rows // host[1]) * host[1])
        size = data.batch * data.length
        source = loader(data, "valid", vocab_size=self.model.config.vocab_size, host=host)
        batches = min(-(-max_tokens // size) or source.batches, source.batches)
        for index, batch in enumerate(source):
            part = self.batch(batch)._replace(bytes_BL=source.target_bytes())
            yield multihost_utils.process_allgather(part, tiled=True) if host[1] > 1 else part
            now = time.perf_counter()
            if not index:  # the first one compiles
                begin = said = now
            elif say and now - said > 3:
                said, each = now, (now - begin) / index
                left = f"{each * (batches - index - 1):.0f} s left"
                say(f"length {data.length}: batch {index + 1} of {batches}, {left}, {size / each:,.0f} tokens/s")
            if index + 1 == batches:
                return
