"""What every source of data yields: one batch of packed rows."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Rows of L tokens. A row holds one or more documents, the first and last of them perhaps in part."""

    tokens_BL: np.ndarray  # int32
    targets_BL: np.ndarray  # int32: what the model should say at each token; 0 where the weight is 0
    weights_BL: np.ndarray  # float32: 1 where the target is scored, 0 elsewhere
    start_BL: np.ndarray  # bool: true at the first token of a document and of the row: no state reaches it from before


class Documents(NamedTuple):
    """What a generated task makes: B documents of L tokens each."""

    tokens_BL: np.ndarray  # int32
    targets_BL: np.ndarray  # int32: what the model should say at each token; anything where it is not scored
    scored_BL: np.ndarray  # bool: the target is defined there
    answer: int  # the place from which on targets answer all of a document
