"""Draw arithmetic modulo 5, as Grazzi et al. 2024 (arXiv:2411.12537, appendix E.1) train and score it.

The layouts are those of their code: xLSTM's `formal_language` tasks, and with brackets DeepMind's "neural networks and
the Chomsky hierarchy". The answer's own token is hidden (PAD), and is predicted at the "=" before it.

In shapes U stands for the digits of a document, X for expressions, T for the tokens of all documents, end to end.
"""

import numpy as np

from mamba3_jax.data.batch import Documents

MODULUS = 5
FLAT = "_+-*=01234"  # the symbol of each id, without brackets
NESTED = "01234+-*()=_"  # the same with brackets; "_" is PAD

# Discrete logarithms to the base 2 modulo 5, and their inverse: 2^0 .. 2^3 = 1, 2, 4, 3. That of 0 is never used.
LOGARITHM = np.array([0, 0, 1, 3, 2], np.int32)
POWER = np.array([1, 2, 4, 3], np.int32)


def flat(numbers_BL: np.ndarray) -> Documents:
    """Draw d op d op .. d = PAD: digits and operators +, -, * are uniform, * binds tighter.

    The target at a digit is the value of the expression up to it, and at "=" the value of the whole. The source draws
    odd lengths only; here a document of even length ends in one more PAD.

    Args:
        numbers_BL: uniform in [0, 1), of at least 3 tokens.
    """
    digits = (numbers_BL.shape[1] - 1) // 2
    answer = 2 * digits - 1
    digit_BU = (numbers_BL[:, :answer:2] * MODULUS).astype(np.int32)
    operator_BU = (numbers_BL[:, 1 : answer - 1 : 2] * 3).astype(np.int32)
    value_BU = prefix_values(digit_BU, operator_BU)

    tokens_BL = np.full(numbers_BL.shape, FLAT.index("_"), np.int32)
    tokens_BL[:, :answer:2] = FLAT.index("0") + digit_BU
    tokens_BL[:, 1 : answer - 1 : 2] = FLAT.index("+") + operator_BU
    tokens_BL[:, answer] = FLAT.index("=")
    targets_BL, scored_BL = np.zeros_like(tokens_BL), np.zeros(tokens_BL.shape, bool)
    targets_BL[:, :answer:2] = FLAT.index("0") + value_BU
    targets_BL[:, answer] = targets_BL[:, answer - 1]
    scored_BL[:, :answer:2] = scored_BL[:, answer] = True
    return Documents(tokens_BL=tokens_BL, targets_BL=targets_BL, scored_BL=scored_BL, answer=answer)


def prefix_values(digit_BU: np.ndarray, operator_BU: np.ndarray) -> np.ndarray:
    """Compute value_k = d_1 op_1 d_2 .. d_k mod 5 for each k; op is 0 for +, 1 for -, 2 for *, one fewer than digits.

    A term is a run of digits joined by *. With term_k the signed product of its digits up to k,
    value_k = term_k + the sum of the terms that ended before.
    """
    place_U = np.arange(digit_BU.shape[1])
    times_BU = np.pad(operator_BU == 2, ((0, 0), (1, 0)))  # before each digit
    minus_BU = np.pad(operator_BU == 1, ((0, 0), (1, 0)))
    begin_BU = np.maximum.accumulate(np.where(times_BU, 0, place_U), axis=1)  # the first digit of the term

    # A product is a sum of logarithms: the running sum minus that before the term. A 0 in it has no logarithm.
    log_BU = LOGARITHM[digit_BU]
    sum_BU = np.cumsum(log_BU, axis=1, dtype=np.int32)
    sum_BU -= np.take_along_axis(sum_BU - log_BU, begin_BU, axis=1)
    zero_BU = np.maximum.accumulate(np.where(digit_BU == 0, place_U, -1), axis=1) >= begin_BU
    term_BU = np.where(zero_BU, 0, POWER[sum_BU % 4])
    term_BU = np.where(np.take_along_axis(minus_BU, begin_BU, axis=1), -term_BU, term_BU)

    ended_BU = np.where(operator_BU == 2, 0, term_BU[:, :-1])
    before_BU = np.pad(np.cumsum(ended_BU, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
    return (term_BU + before_BU) % MODULUS


def nested(numbers_BL: np.ndarray, operators: int) -> Documents:
    """Draw E = PAD PAD, E of 3 tokens less than the document; the only target, at "=", is the value of E.

    E of 1 to 4 tokens is d, -d, (d) or (-d); a longer one is (E op E), its left part of uniform length and op one of
    the first `operators` of +, -, *. A prefix with an open bracket has no value.

    Args:
        numbers_BL: uniform in [0, 1), of at least 4 tokens.
        operators: 2, the source's default, or 3.
    """
    documents, length = numbers_BL.shape
    answer = length - 3
    tokens_BL = np.full(numbers_BL.shape, NESTED.index("_"), np.int32)
    begin_X, size_X = length * np.arange(documents), np.full(documents, answer)
    value_X = expressions(tokens_BL.reshape(-1), numbers_BL.reshape(-1), begin_X, size_X, operators)
    tokens_BL[:, answer] = NESTED.index("=")
    targets_BL, scored_BL = np.zeros_like(tokens_BL), np.zeros(tokens_BL.shape, bool)
    targets_BL[:, answer], scored_BL[:, answer] = value_X, True
    return Documents(tokens_BL=tokens_BL, targets_BL=targets_BL, scored_BL=scored_BL, answer=answer)


def expressions(
    tokens_T: np.ndarray, numbers_T: np.ndarray, begin_X: np.ndarray, size_X: np.ndarray, operators: int
) -> np.ndarray:
    """Write expressions of given begins and sizes into `tokens_T`; return their values modulo 5.

    A call writes all expressions of one depth, and calls itself for all of their parts: the depth grows as the
    logarithm of the size. What a token decides is drawn from its own number: "(" decides where the operator stands, an
    operator's place which operator it is.
    """
    value_X = np.zeros(len(begin_X), np.int64)
    whole_X = size_X >= 5
    leaf_X = np.flatnonzero(~whole_X)
    begin, size = begin_X[leaf_X], size_X[leaf_X]
    bracketed, negative = size >= 3, size % 2 == 0
    place = begin + bracketed + negative
    digit = (numbers_T[place] * MODULUS).astype(np.int64)
    tokens_T[place] = digit
    tokens_T[place[negative] - 1] = NESTED.index("-")
    tokens_T[begin[bracketed]] = NESTED.index("(")
    tokens_T[(begin + size - 1)[bracketed]] = NESTED.index(")")
    value_X[leaf_X] = np.where(negative, -digit, digit) % MODULUS
    if len(leaf_X) == len(begin_X):
        return value_X

    begin, size = begin_X[whole_X], size_X[whole_X]
    left = 1 + (numbers_T[begin] * (size - 4)).astype(np.int64)
    middle = begin + 1 + left
    operator = (numbers_T[middle] * operators).astype(np.int64)
    tokens_T[begin], tokens_T[begin + size - 1] = NESTED.index("("), NESTED.index(")")
    tokens_T[middle] = NESTED.index("+") + operator
    begins, sizes = np.concatenate([begin + 1, middle + 1]), np.concatenate([left, size - 3 - left])
    first, second = np.split(expressions(tokens_T, numbers_T, begins, sizes, operators), 2)
    value_X[whole_X] = np.choose(operator, [first + second, first - second, first * second]) % MODULUS
    return value_X
