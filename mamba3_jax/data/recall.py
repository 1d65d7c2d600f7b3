"""Draw recall: a key asks for the value that stood beside it. Documents have many queries, or one value in a haystack.

In shapes D stands for the pairs of a document, N for what is drawn from, S for the places that a query or a needle may
have, M for the tokens of a needle's value.
"""

import numpy as np

from mamba3_jax.data.batch import Documents

POWER = 0.01  # zoology's power_a: 1 spreads queries evenly

KEYS, WORDS, HAY, VALUE = 64, 64, 64, 4  # symbols of each kind in a haystack; tokens of a needle's value
NEEDLE = 2 + VALUE  # mark, key, value
QUESTION = 1 + VALUE  # question mark, key, and the value but for its last token
NEEDLE_SYMBOLS = (
    *("!", "?"),
    *(f"{kind}{i}" for kind, count in (("k", KEYS), ("w", WORDS), ("h", HAY)) for i in range(count)),
)


def mqar_symbols(vocab_size: int) -> tuple[str, ...]:
    """Name 0, the keys 1 .. V/2 - 1 and the values V/2 .. V - 1."""
    keys = vocab_size // 2
    return ("0", *(f"k{i}" for i in range(1, keys)), *(f"v{i}" for i in range(keys, vocab_size)))


def distinct(numbers_BD: np.ndarray, count: int) -> np.ndarray:
    """Draw D different numbers of 0 .. count - 1 in uniform order (B, D), by the first D steps of Fisher and Yates."""
    documents, drawn = numbers_BD.shape
    order_BN = np.tile(np.arange(count, dtype=np.int32), (documents, 1))
    row_B = np.arange(documents)
    other_BD = np.arange(drawn) + (numbers_BD * (count - np.arange(drawn))).astype(np.int32)
    for place, other_B in enumerate(other_BD.T):
        taken_B = order_BN[row_B, other_B]
        order_BN[row_B, other_B] = order_BN[:, place]
        order_BN[:, place] = taken_B
    return order_BN[:, :drawn]


def mqar(numbers_BL: np.ndarray, pairs: int, vocab_size: int, noise: bool = True) -> Documents:
    """Draw k_1 v_1 .. k_D v_D, then queries: each k_i stands once more, and its target is v_i.

    Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv:2312.04927) as `zoology/data/multiquery_ar.py`
    has it: keys differ and are of 1 .. V/2 - 1, values differ and are of V/2 .. V - 1. After the pairs, every other
    place may have a query: k_1, then k_2, .. take the places s = 1 .. S that are free with probabilities

        p(s) ~ s^(a - 1),  a = 0.01,

    so that most queries come soon. All other tokens are uniform over the vocabulary, or 0. Only queries are scored, and
    their values are not shown. A document of odd length ends in one more of the other tokens.

    Args:
        numbers_BL: uniform in [0, 1), multiples of 2^-32, of at least 4 D tokens.
        pairs: D, at most V/2 - 1.
        vocab_size: V, even, at most 2^13, so that 19 bits of a number are left when it has said which token.
        noise: other tokens are uniform; False: 0.
    """
    context = 2 * pairs
    scaled_BL = numbers_BL * vocab_size
    tokens_BL = scaled_BL.astype(np.int32)
    # The part of a number that is left when it has said which token is uniform too, and says when a clock rings: of
    # exponential clocks with rates p(s), the first D that ring are D draws without replacement, in order.
    at_BS = slice(context, context + 2 * ((numbers_BL.shape[1] - context) // 2), 2)
    left_BS = scaled_BL[:, at_BS] - tokens_BL[:, at_BS]
    rings_BS = -np.log1p(-left_BS) * np.arange(1, left_BS.shape[1] + 1) ** (1 - POWER)
    place_BD = context + 2 * np.argsort(rings_BS, axis=1)[:, :pairs]
    key_BD = 1 + distinct(numbers_BL[:, :context:2], vocab_size // 2 - 1)
    value_BD = vocab_size // 2 + distinct(numbers_BL[:, 1:context:2], vocab_size // 2)

    if not noise:
        tokens_BL[:] = 0
    tokens_BL[:, :context:2], tokens_BL[:, 1:context:2] = key_BD, value_BD
    np.put_along_axis(tokens_BL, place_BD, key_BD, axis=1)
    targets_BL, scored_BL = np.zeros_like(tokens_BL), np.zeros(tokens_BL.shape, bool)
    np.put_along_axis(targets_BL, place_BD, value_BD, axis=1)
    np.put_along_axis(scored_BL, place_BD, True, axis=1)
    return Documents(tokens_BL=tokens_BL, targets_BL=targets_BL, scored_BL=scored_BL, answer=context)


def needle(numbers_BL: np.ndarray, pairs: int, alike: bool = False) -> Documents:
    """Draw a haystack with D needles "! k w_1 .. w_M", then "? k w_1 .. w_(M-1)" for one of them: targets w_1 .. w_M.

    This follows RULER's NIAH (Hsieh et al. 2024, arXiv:2404.06654), whose haystacks are text, for models that were
    trained on text; here all is symbols, to be learned from nothing. Hay is uniform over symbols of its own, as the
    noise of RULER's single 1, or with `alike` over keys and words, so that nothing but the mark says what a needle is.
    Needles have different keys; with D > 1 the others are distractors (RULER's multikey). A value is M = 4 of 64 words.
    Needles do not overlap, and all ways to place them are equally likely: a single needle begins at

        floor(u (L_h - 5)),  u uniform in [0, 1),  L_h = L - 5 tokens of haystack.

    Each target follows the value's tokens before it, so all are right just where decoding from k gives the whole value.

    Args:
        numbers_BL: uniform in [0, 1), multiples of 2^-32, of at least 6 D + 5 tokens.
        pairs: D, at most 64.
        alike: hay is made of the same symbols as needles.
    """
    documents, length = numbers_BL.shape
    hay = length - QUESTION
    first_key = NEEDLE_SYMBOLS.index("k0")
    first, kinds = (first_key, KEYS + WORDS) if alike else (first_key + KEYS + WORDS, HAY)
    scaled_BL = numbers_BL * kinds
    tokens_BL = first + scaled_BL.astype(np.int32)
    left_BL = scaled_BL % 1  # uniform too: it draws places, keys, and which needle is asked for
    # Shrink every needle to one place: then any different places in the shorter haystack will do.
    begin_BD = np.sort(distinct(left_BL[:, :pairs], hay - pairs * (NEEDLE - 1)), axis=1)
    begin_BD = begin_BD + (NEEDLE - 1) * np.arange(pairs)
    key_BD = first_key + distinct(left_BL[:, pairs : 2 * pairs], KEYS)
    asked_B1 = (left_BL[:, 2 * pairs, None] * pairs).astype(np.int32)

    np.put_along_axis(tokens_BL, begin_BD, NEEDLE_SYMBOLS.index("!"), axis=1)
    np.put_along_axis(tokens_BL, begin_BD + 1, key_BD, axis=1)
    place_BX = (begin_BD[:, :, None] + np.arange(2, NEEDLE)).reshape(documents, -1)
    words_BX = first_key + KEYS + (np.take_along_axis(numbers_BL, place_BX, axis=1) * WORDS).astype(np.int32)
    np.put_along_axis(tokens_BL, place_BX, words_BX, axis=1)
    value_BM = np.take_along_axis(words_BX, asked_B1 * VALUE + np.arange(VALUE), axis=1)

    tokens_BL[:, hay] = NEEDLE_SYMBOLS.index("?")
    tokens_BL[:, hay + 1] = np.take_along_axis(key_BD, asked_B1, axis=1)[:, 0]
    tokens_BL[:, hay + 2 :] = value_BM[:, :-1]
    targets_BL, scored_BL = np.zeros_like(tokens_BL), np.zeros(tokens_BL.shape, bool)
    targets_BL[:, hay + 1 :], scored_BL[:, hay + 1 :] = value_BM, True
    return Documents(tokens_BL=tokens_BL, targets_BL=targets_BL, scored_BL=scored_BL, answer=hay + 1)


def needle_depth(tokens_BL: np.ndarray) -> np.ndarray:
    """Return how deep in each haystack of `needle` the needle asked for begins (B,): 0 is first, 1 last."""
    hay = tokens_BL.shape[1] - QUESTION
    mark_BL = tokens_BL[:, : hay - 1] == NEEDLE_SYMBOLS.index("!")
    begin_B = (mark_BL & (tokens_BL[:, 1:hay] == tokens_BL[:, hay + 1, None])).argmax(axis=1)
    return begin_B / max(1, hay - NEEDLE)
