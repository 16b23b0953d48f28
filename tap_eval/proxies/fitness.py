"""What a proxy is worth: Eq. 6, with the design's two optional terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import rankdata

LayerScores = Sequence[float]
"""one score a layer of a network"""
Worth = Literal["kl", "accuracy", "benchmark"]
"""what counts in fitness: of the allocation that is measured exp(-KL) of outputs from full precision, or the paper's
top-1; or of many that were measured before how well scores foretell them"""
Foretelling = Callable[[LayerScores], float]
"""how well scores of layers foretell what allocations were measured to be, in [-1, 1]"""


@dataclass(frozen=True)
class FitnessWeights:
    """`phi = alpha * rho + (1 - alpha) * worth - beta * cost + gamma * novelty`: Eq. 6 if worth is accuracy."""

    alpha: float = 0.1
    beta: float = 0.0
    gamma: float = 0.0
    worth: Worth = "accuracy"

    def worths(self, top1: Sequence[float], kl: Sequence[float], foretelling: Sequence[float] = ()) -> list[float]:
        """What networks with these accuracies, these mean divergences (nats) from full precision, or these correlations
        with what was measured before, count."""
        match self.worth:
            case "accuracy":
                return list(top1)
            case "kl":
                return [math.exp(-nats) for nats in kl]
            case "benchmark":
                return list(foretelling)

    @property
    def share(self) -> float:
        """What a worth of 1 adds to fitness."""
        return 1 - self.alpha

    def worth_term(self, top1: Sequence[float], kl: Sequence[float], foretelling: Sequence[float] = ()) -> float:
        """What these add to fitness, in the mean over networks."""
        return self.share * _mean(self.worths(top1, kl, foretelling))

    def offset(self, rho: Sequence[float], cost: float = 0.0, novelty: float = 0.0) -> float:
        """Fitness but for worth; `rho` holds one number a network, which count in their mean."""
        return self.alpha * _mean(rho) - self.beta * cost + self.gamma * novelty


def rank_correlation(scores: Sequence[float], errors: Sequence[float]) -> float:
    """Spearman's rho between scores and layer errors; 0 where either is constant or has one layer."""
    if len(scores) < 2 or len(set(scores)) < 2 or len(set(errors)) < 2:
        return 0.0
    ranks = np.column_stack([rankdata(scores), rankdata(errors)])
    return float(np.corrcoef(ranks, rowvar=False)[1, 0])  # as scipy.stats.spearmanr has it, which takes far longer


def novelty(scores: Sequence[LayerScores], others: Sequence[Sequence[LayerScores]]) -> float:
    """How far a proxy ranks layers from the nearest other: min over others of 1 - |rho|, in [0, 1].

    `scores` holds one list a network of the benchmark set, as does each of `others`; rho is
    the mean over networks. 1 when there is no other.
    """
    if not others:
        return 1.0
    return min(
        1 - abs(_mean([rank_correlation(*pair) for pair in zip(scores, other, strict=True)])) for other in others
    )


def cost(bit_operations: Sequence[int], most: Sequence[int]) -> float:
    """Bit operations of the allocations as a share of those at the most bits, in [0, 1]; mean over networks."""
    return _mean([spent / full for spent, full in zip(bit_operations, most, strict=True)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
