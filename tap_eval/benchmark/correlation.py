"""How well a rule foretells what measured allocations are worth: the paper's Eq. 3.

A rule is held against allocations of about one size, since among all sizes the size alone foretells much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

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
    rng = np.random.default_rng(seed)
    samples = [np.vstack([np.arange(len(its)), rng.integers(0, len(its), (_SAMPLES, len(its)))]) for its in places]
    whole = np.hstack([its[sample] for its, sample in zip(places, samples, strict=True)])
    pairs = [*zip(places, samples, strict=True)]
    return Correlation(
        _interval(np.mean([spearman(x[its][sample], y[its][sample]) for its, sample in pairs], axis=0)),
        _interval(np.mean([kendall(x[its], y[its], sample) for its, sample in pairs], axis=0)),
        _interval(spearman(x[whole], y[whole])),
    )


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """rho of each row of two arrays (S, N), ties by their mean rank; 0 where either is constant."""
    ranks = [rankdata(each, axis=1) for each in (x, y)]
    mine, theirs = (each - each.mean(1, keepdims=True) for each in ranks)
    return _ratio((mine * theirs).sum(1), (mine**2).sum(1) * (theirs**2).sum(1))


def kendall(x: np.ndarray, y: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """tau-b of two arrays (N,), of each of so many samples (S, N) of their places; 0 where either is constant."""
    counts = np.stack([np.bincount(each, minlength=len(x)) for each in samples]).astype(float)
    mine, theirs = (np.sign(each[:, None] - each) for each in (x, y))

    def pairs(signs: np.ndarray) -> np.ndarray:
        found: np.ndarray = ((counts @ signs) * counts).sum(1)
        return found

    return _ratio(pairs(mine * theirs), pairs(mine**2) * pairs(theirs**2))


def _ratio(product: np.ndarray, squares: np.ndarray) -> np.ndarray:
    return np.divide(product, np.sqrt(squares), out=np.zeros(len(product)), where=squares > 0)


def _interval(figures: np.ndarray) -> Interval:
    """The first is of what was measured, the others are of samples of it."""
    low, high = np.percentile(figures[1:], _ENDS)
    return Interval(float(figures[0]), float(low), float(high))
