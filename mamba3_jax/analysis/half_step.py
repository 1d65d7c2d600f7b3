"""Predict where errors of angles alone end a sum mod n: rotations miss multiples of a turn / n, and the errors add up.

The error of the sum over L tokens has the mean mu L and the standard deviation sigma sqrt(L). It reaches half a step
between two products that a plane tells apart where mu L + sigma sqrt(L) = pi / products. The frame is that of
arXiv:2605.07755: a recurrence that nothing corrects.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class AngleErrors(NamedTuple):
    """By how much the rotations of each plane miss multiples of a turn / n, in radians."""

    order: int  # n
    multiple_HS: np.ndarray  # m: element g turns by about m g turns / n
    turn_VHS: np.ndarray  # mean rotation of each element; NaN for one that does not occur
    worst_HS: np.ndarray  # the largest error of an element's mean
    drift_HS: np.ndarray  # mean error of a token
    spread_HS: np.ndarray  # times sqrt(L), the standard deviation of the error of a sum over L tokens

    def of_plane(self, head: int, plane: int) -> dict:
        """Return one plane, with the length at which drift and one standard deviation add up to half a step."""
        at = (head, plane)
        multiple, drift, spread = int(self.multiple_HS[at]), float(self.drift_HS[at]), float(self.spread_HS[at])
        products = self.order // math.gcd(multiple, self.order)  # how many the plane tells apart
        return {
            "multiple": multiple,
            "products": products,
            "turns": (self.turn_VHS[:, head, plane] / (2 * np.pi)).tolist(),
            "worst": float(self.worst_HS[at]),
            "drift": drift,
            "spread": spread,
            "fails": adds_up(abs(drift), spread, np.pi / products),
        }


def angle_errors(rotation_BLHS: np.ndarray, tokens_BL: np.ndarray, order: int) -> AngleErrors:
    """Compare the rotations of planes with the nearest multiples m g / n of a turn, one m for each plane.

    The first token of a row has nothing before it to rotate, so it does not count.
    """
    rotation_BLHS, tokens_BL = rotation_BLHS[:, 1:], tokens_BL[:, 1:]
    here_V = np.unique(tokens_BL)
    turn_VHS = np.full((order, *rotation_BLHS.shape[2:]), np.nan)
    for element in here_V:
        turn_VHS[element] = rotation_BLHS[tokens_BL == element].mean(axis=0)
    wanted_MV = 2 * np.pi / order * np.multiply.outer(np.arange(order), here_V)
    missed_MVHS = within_half(turn_VHS[here_V] - wanted_MV[..., None, None])
    multiple_HS = np.argmin(np.square(missed_MVHS).mean(axis=1), axis=0)
    error_BLHS = within_half(rotation_BLHS - 2 * np.pi / order * multiple_HS * tokens_BL[..., None, None])
    sum_BHS, length = error_BLHS.sum(axis=1), tokens_BL.shape[1]
    return AngleErrors(
        order=order,
        multiple_HS=multiple_HS,
        turn_VHS=turn_VHS,
        worst_HS=np.take_along_axis(abs(missed_MVHS).max(axis=1), multiple_HS[None], axis=0)[0],
        drift_HS=sum_BHS.mean(axis=0) / length,
        spread_HS=sum_BHS.std(axis=0) / math.sqrt(length),
    )


def within_half(angle):
    """Return angles modulo a turn, in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def adds_up(drift: float, spread: float, half: float) -> float:
    """Return the length L at which drift L + spread sqrt(L) = half; inf where nothing adds up."""
    if drift:
        return ((math.sqrt(spread**2 + 4 * drift * half) - spread) / (2 * drift)) ** 2
    return (half / spread) ** 2 if spread else math.inf


def tells(plane: dict) -> bool:
    """Tell whether a plane keeps some products apart: it turns, and misses no element by half a step or more."""
    return plane["products"] > 1 and plane["worst"] < np.pi / plane["products"]


def carriers(planes: Sequence[dict], order: int) -> list[dict]:
    """Return the planes with the most memory that together tell n products apart; [] where none do."""
    chosen, apart = [], 1
    for plane in sorted(filter(tells, planes), key=lambda plane: -plane["memory"]):
        if (known := math.lcm(apart, plane["products"])) > apart:
            chosen, apart = [*chosen, plane], known
    return chosen if apart == order else []


def prediction(chosen: list[dict], shown: list[dict], order: int) -> dict:
    """Apply the simple rule: the model fails where the first of the planes that carry the sum misses half a step."""
    if chosen:
        return {"fails": min(plane["fails"] for plane in chosen), "planes": chosen}
    if not order:
        return {"absent": "the group is not cyclic"}
    if not any("angle" in layer for layer in shown):
        return {"absent": "no layer rotates planes by angles"}
    return {"absent": f"no planes turn by multiples of a turn / {order} that tell all sums apart"}
