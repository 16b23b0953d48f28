"""Which of many expressions to offer a small model, which cannot tell them apart: those that promise most.

A Gaussian process foresees fitness from the expressions that have been judged, as evolution with a metamodel does
(Emmerich, Giannakoglou and Naujoks 2006). Two expressions are alike as far as they give layers, and channels, like
scores, so they are compared by the logarithms of their scores on the networks at hand; in these an expression is linear
in its exponents. Nothing is run or measured for it.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist, pdist, squareform

from prompts.expression import CHANNEL, exponents

_Layer = Mapping[str, Any]
"""features of a layer"""
_LEAST = 1e-9
"""what the code of an expression raises a feature to"""
_NOISE = 0.1
"""variance of what like expressions differ by, where that of fitness is 1: single roundings"""
_CURIOSITY = 0.5
"""standard deviations that count as promise"""
_OF_CHANNELS = 0.5
"""how much channels count beside layers: they decide only how a layer's bits are spread"""
_ENOUGH = 3
"""expressions that have to be judged before anything is foreseen"""
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
    square: float
    """of the length of the covariance"""
    factor: tuple[np.ndarray, bool]
    """of the covariance, by Cholesky"""
    weights: np.ndarray
    """(N,), which times the covariance are fitness from its mean, in standard deviations"""


class Forecast:
    """Of fitness on networks, of each of which the layers are given; for any number of threads.

    What the networks make of an exponent is computed once, and a fit once for all who ask with the same judged
    expressions, as siblings do.
    """

    def __init__(self, networks: Sequence[Sequence[_Layer]]) -> None:
        self._networks = networks
        self._columns: dict[str, np.ndarray] = {}
        self._axes = lru_cache(_KEPT)(self._turned)
        self._fits: list[_Fit] = []
        self._fitting = threading.Lock()

    def promising(self, expressions: Sequence[str], judged: Mapping[str, float], count: int) -> list[str]:
        """The `count` of `expressions` with the highest upper confidence bound of fitness, the highest first.

        `judged` has the fitness of others. As long as next to nothing has been judged, the first.
        """
        new = [each for each in dict.fromkeys(expressions) if each not in judged] or list(expressions)
        if len(judged) < _ENOUGH:
            return new[:count]
        mean, deviation = self._foreseen(self._fit(judged), [exponents(each) for each in new])
        order = np.argsort(-(mean + _CURIOSITY * deviation), kind="stable")
        return [new[place] for place in order[:count]]

    def _fit(self, judged: Mapping[str, float]) -> _Fit:
        with self._fitting:
            if not self._fits or self._fits[0].judged != judged:
                self._fits = [self._fitted(dict(judged))]
            return self._fits[0]

    def _fitted(self, judged: dict[str, float]) -> _Fit:
        """Eq. 2.25 of Rasmussen and Williams 2006, with a squared exponential as the covariance, whose length is the
        median distance between what was judged."""
        found = [exponents(each) for each in judged]
        keys = sorted({key for each in found for key in each})
        powers = _matrix(found, keys)
        squares = pdist(powers @ self._axes(*keys), "sqeuclidean")
        square = float(np.median(squares)) or 1.0
        np.exp(np.divide(squares, -2 * square, out=squares), out=squares)
        covariance = squareform(squares)
        np.fill_diagonal(covariance, 1 + _NOISE)
        factor = cho_factor(covariance.T, overwrite_a=True)  # which is symmetric, and so is not copied
        fitness = np.array(list(judged.values()))
        return _Fit(
            judged, keys, powers, square, factor, cho_solve(factor, (fitness - fitness.mean()) / (fitness.std() or 1.0))
        )

    def _foreseen(self, fit: _Fit, asked: Sequence[Mapping[str, float]]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (Q,) of what has exponents `asked`; Eqs. 2.25 and 2.26 there."""
        keys = [*fit.keys, *sorted({key for each in asked for key in each} - set(fit.keys))]
        axes = self._axes(*keys)
        seen = fit.powers @ axes[: len(fit.keys)]
        across = np.exp(-cdist(_matrix(asked, keys) @ axes, seen, "sqeuclidean") / (2 * fit.square))
        variance = 1 - np.einsum("qn,nq->q", across, cho_solve(fit.factor, across.T))
        return across @ fit.weights, np.sqrt(np.maximum(variance, 0.0))

    def _turned(self, *keys: str) -> np.ndarray:
        """Points (K, up to K), one an exponent of 1, that lie to each other as what the exponents add to the logarithms
        of scores, of which there may be many thousands."""
        for key in keys:
            if key not in self._columns:
                self._columns[key] = np.concatenate([_logarithms(key, layers) for layers in self._networks])
        columns = np.array([self._columns[key] for key in keys])
        return np.transpose(np.asarray(np.linalg.qr(columns.T, mode="r")))


def _matrix(powers: Sequence[Mapping[str, float]], keys: Sequence[str]) -> np.ndarray:
    return np.array([[each.get(key, 0.0) for key in keys] for each in powers])


def _logarithms(key: str, layers: Sequence[_Layer]) -> np.ndarray:
    """What an exponent of 1 adds: of the layers (L,), then of all channels; one of both is zero."""
    if key.startswith(CHANNEL):
        rows = [_centred(_log(layer["channels"][key.removeprefix(CHANNEL)])) for layer in layers]
        return np.concatenate([np.zeros(len(layers)), *rows]) * (_OF_CHANNELS / math.sqrt(len(layers)))
    if key == "exp":
        found = np.array([layer["depth"] for layer in layers])
    elif key.startswith("if "):
        found = math.log(2) * np.array([_holds(key.removeprefix("if "), layer) for layer in layers])
    else:
        found = _log([layer[key] for layer in layers])
    return np.concatenate([_centred(found), np.zeros(sum(layer["out_channels"] for layer in layers))])


def _centred(values: np.ndarray) -> np.ndarray:
    """From their mean, by the root of their number, so that squares sum to a variance."""
    return (values - values.mean()) / math.sqrt(len(values))


def _log(values: Sequence[float]) -> np.ndarray:
    return np.log(np.maximum(values, _LEAST))


def _holds(condition: str, layer: _Layer) -> bool:
    """One of `prompts.expression.BOOSTS`."""
    name, *compared = condition.split()
    if not compared:
        return bool(layer[name])
    relation, value = compared[0], json.loads(compared[1].replace("'", '"'))
    return bool(layer[name] > value if relation == ">" else layer[name] == value)
