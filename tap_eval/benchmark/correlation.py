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
    overall_spearman: Interval
    """over all sizes together"""
    overall_kendall: Interval
    """likewise"""


def noise(allocations: Sequence[Allocation]) -> np.ndarray:
    """(A, L), of each of A allocations, which have bits of whole layers: `4**-weight bits + 4**-activation bits`."""
    weights, activations = (
        np.array([getattr(each, of) for each in allocations], float) for of in ("weights", "activations")
    )
    found: np.ndarray = 4.0**-weights + 4.0**-activations
    return found


def expected_losses(scores: Sequence[Score], noise: np.ndarray) -> np.ndarray:
    """What the allocator minimizes, (A,): the sum over layers of `weight(score)` times the layer's `noise`, (A, L).

    Of a layer whose channels have scores, their mean counts.
    """
    found: np.ndarray = noise @ importance([layer_score(score) for score in scores])
    return found


def correlate(foretold: Sequence[float], measured: Sequence[float], strata: Sequence[int], seed: int) -> Correlation:
    """Of two figures an allocation, each in one of the `strata`; 1 where they rank allocations the same.

    A stratum in which either is constant counts as 0.
    """
    x, y, places = np.asarray(foretold, float), np.asarray(measured, float), _places(strata)
    rng = np.random.default_rng(seed)
    samples = [np.vstack([np.arange(len(its)), rng.integers(0, len(its), (_SAMPLES, len(its)))]) for its in places]
    whole = np.hstack([its[sample] for its, sample in zip(places, samples, strict=True)])
    pairs = [*zip(places, samples, strict=True)]
    return Correlation(
        _interval(_within(x, y, [its[sample] for its, sample in pairs]), biased=True),
        _interval(np.mean([kendall(x[its], y[its], sample) for its, sample in pairs], axis=0)),
        _interval(spearman(x[whole], y[whole]), biased=True),
        _interval(kendall(x, y, whole)),
    )


def foretelling(foretold: Sequence[float], measured: Sequence[float], strata: Sequence[int]) -> float:
    """`correlate(...).spearman.value` alone, without the bootstrap."""
    places = [its[None] for its in _places(strata)]
    return float(_within(np.asarray(foretold, float), np.asarray(measured, float), places)[0])


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


def _places(strata: Sequence[int]) -> list[np.ndarray]:
    """Of each stratum."""
    groups = np.asarray(strata)
    return [np.flatnonzero(groups == group) for group in np.unique(groups)]


def _within(x: np.ndarray, y: np.ndarray, samples: Sequence[np.ndarray]) -> np.ndarray:
    """(S,), Spearman's in the mean over strata, of each of which there are `samples` of places (S, N)."""
    found: np.ndarray = np.mean([spearman(x[its], y[its]) for its in samples], axis=0)
    return found


def _ratio(product: np.ndarray, squares: np.ndarray) -> np.ndarray:
    return np.divide(product, np.sqrt(squares), out=np.zeros(len(product)), where=squares > 0)


def _interval(figures: np.ndarray, biased: bool = False) -> Interval:
    """The first is of what was measured, the others are of samples of it.

    Spearman's coefficient is `biased`: of few allocations it lies below that of all in the mean, and of samples, which
    have ties, below that of what they are drawn from, by about as much. Both are taken off (Efron and Tibshirani 1993,
    chapter 10); else the mean over ranges of size, narrow as it is, would leave out the true figure half of the time.
    """
    value, samples = float(figures[0]), figures[1:]
    off = 2 * (value - float(samples.mean())) if biased else 0.0
    low, high = np.clip(np.percentile(samples, _ENDS) + off, -1, 1)
    return Interval(value, float(low), float(high))
