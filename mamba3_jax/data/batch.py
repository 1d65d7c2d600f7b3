"""The batch of packed rows that every source of data yields, and the documents that generated tasks make."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of L tokens. A row holds one or more documents, of which the first and the last may be cut."""

    tokens_BL: np.ndarray  # int32
    targets_BL: np.ndarray  # int32: what the model should say at each token; 0 where the weight is 0
    weights_BL: np.ndarray  # float32: 1 where the target is scored, 0 elsewhere
    start_BL: np.ndarray  # bool: true at the first token of each document and of the row, which no state may reach


class Documents(NamedTuple):
    """B documents of L tokens each, made by a generated task."""

    tokens_BL: np.ndarray  # int32
    targets_BL: np.ndarray  # int32: what the model should say at each token; anything where it is not scored
    scored_BL: np.ndarray  # bool: the target is defined there
    answer: int  # the first place of the targets that answer the whole document, which labels="answer" scores alone
