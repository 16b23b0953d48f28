"""Sensitivity scores, as a proxy gives them and bits are allocated from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Score = float | list[float]
"""A layer's sensitivity: one number, or one for each of its output channels."""
Scores = list[Score]
REACH = math.log(4.0**3)
"""how far from the mean a score counts with its ratio: to about three bits"""


def layer_score(score: Score) -> float:
    """A layer's score: its own, or the mean over its output channels."""
    if isinstance(score, list):
        return math.fsum(score) / len(score) if max(map(abs, score)) < 1e300 else math.inf
    return float(score)


def importance(scores: Sequence[float]) -> np.ndarray:
    """`weight(score)`: a monotone map of scores to positive numbers, (N,) float64.

    `exp(REACH * tanh(z / REACH))` with `z` the logarithm of the score, from the mean of all.
    Near the mean, scores count with their ratios; far from it they keep their order, however
    wildly they are scaled. Scores of which some are not positive have no logarithm: they are
    taken for logarithms themselves, `z` being their distance from the mean in standard
    deviations.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.min() > 0:
        z = np.log(values)
        z -= z.mean()
    else:
        z = values / max(np.abs(values).max(), 1e-300)  # so that squares do not overflow
        z = (z - z.mean()) / (z.std() or 1.0)
    return squashed(z)


def squashed(z: np.ndarray) -> np.ndarray:
    """Importance, of any shape, from logarithms that are counted from their mean."""
    return np.exp(REACH * np.tanh(z / REACH))
