"""Which of many expressions to offer a small model, which cannot tell them apart: those that promise most.

A Gaussian process foresees fitness from the expressions that have been judged, as evolution with a metamodel does
(Emmerich, Giannakoglou and Naujoks 2006), about a line through what `agents.prior` foretells (Rasmussen and Williams
2006, section 2.7). Two expressions are alike as far as they give layers, and channels, like scores, so they are
compared by the logarithms of their scores on the networks at hand; in these an expression is linear in its exponents.
Nothing is run or measured for it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist, pdist, squareform

from agents.prior import Layer, Powers, floored, logarithms, matrix
from prompts.expression import CHANNEL, exponents

_NOISE = 0.1
"""variance of what like expressions differ by, where that of what the prior leaves is 1: single roundings"""
_SHARES = np.geomspace(0.03, 1.2, 6)
"""standard deviations of what the prior leaves, where that of fitness is 1; the likeliest is taken"""
_LEVEL, _SLOPE = 100.0, 10.0
"""variances of the line, which say next to nothing of it, where those of fitness and of what is foretold are 1"""
_CURIOSITY = 0.5
"""standard deviations that count as promise"""
_OF_CHANNELS = 0.5
"""how much channels count beside layers: they decide only how a layer's bits are spread"""
_ENOUGH = 3
"""expressions that have to be judged before they teach anything"""
_KEPT = 64
"""sets of exponents whose points are kept: soon all are among them"""


@dataclass(frozen=True)
class _Fit:
    """What judged expressions say of others."""

    judged: dict[str, float]
    keys: list[str]
    """of exponents, sorted"""
    powers: np.ndarray
    """(N, K)"""
    foretold: np.ndarray
    """(N,)"""
    square: float
    """of the length of the covariance"""
    share: float
    """of `_SHARES`"""
    factor: tuple[np.ndarray, bool]
    """of the covariance, by Cholesky"""
    weights: np.ndarray
    """(N,), which times the covariance are fitness from its mean, in standard deviations"""


class Forecast:
    """Of fitness on networks, for any number of threads.

    `layers` has the features of each network, and `prior` what expressions should come to. What the networks make of an
    exponent is computed once, and a fit once for all who ask with the same judged expressions, as siblings do.
    """

    def __init__(self, layers: Sequence[Sequence[Layer]], prior: Callable[[Sequence[Powers]], np.ndarray]) -> None:
        self._networks = layers
        self._prior = prior
        self._columns: dict[str, np.ndarray] = {}
        self._axes = lru_cache(_KEPT)(self._turned)
        self._fits: list[_Fit] = []
        self._fitting = threading.Lock()

    def promising(self, expressions: Sequence[str], judged: Mapping[str, float], count: int) -> list[str]:
        """The `count` of `expressions` with the highest upper confidence bound of fitness, the highest first.

        `judged` has the fitness of others. As long as next to nothing has been judged, the prior decides.
        """
        new = [each for each in dict.fromkeys(expressions) if each not in judged] or list(expressions)
        asked = [exponents(each) for each in new]
        promise = self._prior(asked)
        if len(judged) >= _ENOUGH:
            mean, deviation = self._foreseen(self._fit(judged), asked, promise)
            promise = mean + _CURIOSITY * deviation
        return [new[place] for place in np.argsort(-promise, kind="stable")[:count]]

    def _fit(self, judged: Mapping[str, float]) -> _Fit:
        with self._fitting:
            if not self._fits or self._fits[0].judged != judged:
                self._fits = [self._fitted(dict(judged))]
            return self._fits[0]

    def _fitted(self, judged: dict[str, float]) -> _Fit:
        """The likeliest of some processes, by Eqs. 2.30 and 2.40 of Rasmussen and Williams 2006, with a squared
        exponential beside the line, whose length is the median distance between what was judged."""
        found = [exponents(each) for each in judged]
        keys = sorted({key for each in found for key in each})
        powers, foretold = matrix(found, keys), self._foretold(judged, found)
        squares = pdist(powers @ self._axes(*keys), "sqeuclidean")
        square = float(np.median(squares)) or 1.0
        alike = squareform(np.exp(squares / (-2 * square)))
        np.fill_diagonal(alike, 1 + _NOISE)
        fitness = np.array(list(judged.values()))
        fitness = (fitness - fitness.mean()) / (fitness.std() or 1.0)
        line, fits = _line(foretold, foretold), []
        for share in _SHARES:
            factor = cho_factor(share**2 * alike + line @ line.T, lower=True)
            weights = cho_solve(factor, fitness)
            likelihood = -fitness @ weights / 2 - np.log(np.diag(factor[0])).sum()
            fits.append((likelihood, share, factor, weights))
        _, *likeliest = max(fits, key=lambda each: each[0])
        return _Fit(judged, keys, powers, foretold, square, *likeliest)

    def _foretold(self, judged: Mapping[str, float], found: Sequence[Powers]) -> np.ndarray:
        """What the prior says of the judged, of most of which the last fit knows it."""
        known = dict(zip(self._fits[0].judged, self._fits[0].foretold, strict=True)) if self._fits else {}
        new = [powers for expression, powers in zip(judged, found, strict=True) if expression not in known]
        fresh = iter(self._prior(new)) if new else iter(())
        return np.array([known[each] if each in known else next(fresh) for each in judged])

    def _foreseen(self, fit: _Fit, asked: Sequence[Powers], foretold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (Q,) of what has exponents `asked`; Eqs. 2.25 and 2.26 there."""
        keys = [*fit.keys, *sorted({key for each in asked for key in each} - set(fit.keys))]
        axes = self._axes(*keys)
        seen, line = fit.powers @ axes[: len(fit.keys)], _line(foretold, fit.foretold)
        alike = np.exp(-cdist(matrix(asked, keys) @ axes, seen, "sqeuclidean") / (2 * fit.square))
        across = fit.share**2 * alike + line @ _line(fit.foretold, fit.foretold).T
        own = fit.share**2 + (line**2).sum(1)
        variance = own - np.einsum("qn,nq->q", across, cho_solve(fit.factor, across.T))
        return across @ fit.weights, np.sqrt(np.maximum(variance, 0.0))

    def _turned(self, *keys: str) -> np.ndarray:
        """Points (K, up to K), one an exponent of 1, that lie to each other as what the exponents add to the logarithms
        of scores, of which there may be many thousands."""
        for key in keys:
            if key not in self._columns:
                self._columns[key] = np.concatenate([_column(key, layers) for layers in self._networks])
        columns = np.array([self._columns[key] for key in keys])
        return np.transpose(np.asarray(np.linalg.qr(columns.T, mode="r")))


def _line(foretold: np.ndarray, of: np.ndarray) -> np.ndarray:
    """What spans the line through what is foretold `of` the judged, where (Q,) is `foretold`: its products, of (Q, 2),
    are covariances."""
    slope = (foretold - of.mean()) / (of.std() or 1.0)
    return np.column_stack([np.full(len(foretold), math.sqrt(_LEVEL)), math.sqrt(_SLOPE) * slope])


def _column(key: str, layers: Sequence[Layer]) -> np.ndarray:
    """What an exponent of 1 adds: of the layers (L,), then of all channels; one of both is zero."""
    if key.startswith(CHANNEL):
        rows = [_centred(floored(layer["channels"][key.removeprefix(CHANNEL)])) for layer in layers]
        return np.concatenate([np.zeros(len(layers)), *rows]) * (_OF_CHANNELS / math.sqrt(len(layers)))
    return np.concatenate([_centred(logarithms(key, layers)), np.zeros(sum(layer["out_channels"] for layer in layers))])


def _centred(values: np.ndarray) -> np.ndarray:
    """From their mean, by the root of their number, so that squares sum to a variance."""
    return (values - values.mean()) / math.sqrt(len(values))
