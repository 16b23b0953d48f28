"""How well a rule foretells what measured allocations are worth: the paper's Eq. 3.

A rule is held against allocations of about one size, since among all sizes the size alone foretells much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau, spearmanr

from tap_eval.allocation.score import Score, importance, layer_score
from tap_eval.quantization.quantizer import Allocation

_SAMPLES = 1000
"""of the bootstrap"""
_ENDS = (2.5, 97.5)
"""per cent"""


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % interval, by the percentiles of a bootstrap over allocations."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Correlation:
    """Of what is foretold with what was measured."""

    spearman: Interval
    """within a stratum, in the mean over strata"""
    kendall: Interval
    """tau-b, likewise"""
    overall: Interval
    """Spearman's, over all sizes together"""


def expected_loss(scores: Sequence[Score], allocation: Allocation) -> float:
    """What the allocator minimizes: the sum over layers of `weight(score) * (4**-weight bits + 4**-activation bits)`.

    `allocation` has bits of whole layers; of a layer whose channels have scores, their mean counts.
    """
    weights = importance([layer_score(score) for score in scores])
    bits = zip(allocation.weights, allocation.activations, strict=True)
    return float(
        sum(
            weight * (4.0**-mine + 4.0**-input_bits)
            for weight, (mine, input_bits) in zip(weights, bits, strict=True)
            if isinstance(mine, int)
        )
    )


def correlate(foretold: Sequence[float], measured: Sequence[float], strata: Sequence[int], seed: int) -> Correlation:
    """Of two figures an allocation, each in one of the `strata`; 1 where they rank allocations the same.

    A stratum in which either is constant counts as 0.
    """
    x, y, groups = np.asarray(foretold, float), np.asarray(measured, float), np.asarray(strata)
    places = [np.flatnonzero(groups == group) for group in np.unique(groups)]

    def within(rank: Callable[[np.ndarray, np.ndarray], float], rows: Sequence[np.ndarray]) -> float:
        return float(np.mean([rank(x[each], y[each]) for each in rows]))

    def overall(rows: Sequence[np.ndarray]) -> float:
        return _spearman(x[np.concatenate(rows)], y[np.concatenate(rows)])

    rng = np.random.default_rng(seed)
    samples = [[rng.choice(each, len(each)) for each in places] for _ in range(_SAMPLES)]

    def interval(figure: Callable[[Sequence[np.ndarray]], float]) -> Interval:
        low, high = np.percentile([figure(rows) for rows in samples], _ENDS)
        return Interval(figure(places), float(low), float(high))

    return Correlation(
        interval(lambda rows: within(_spearman, rows)), interval(lambda rows: within(_kendall, rows)), interval(overall)
    )


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(spearmanr(x, y)[0]) if np.ptp(x) and np.ptp(y) else 0.0


def _kendall(x: np.ndarray, y: np.ndarray) -> float:
    return float(kendalltau(x, y)[0]) if np.ptp(x) and np.ptp(y) else 0.0
