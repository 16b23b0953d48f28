"""Sensitivity scores, as a proxy gives them and bits are allocated from them."""

from __future__ import annotations

import math

Score = float | list[float]
"""A layer's sensitivity: one number, or one for each of its output channels."""
Scores = list[Score]


def layer_score(score: Score) -> float:
    """A layer's score: its own, or the mean over its output channels."""
    if isinstance(score, list):
        return math.fsum(score) / len(score) if all(abs(s) < 1e300 for s in score) else math.inf
    return float(score)
