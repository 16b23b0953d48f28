"""Which of many expressions to offer a small model, which cannot tell them apart: those that promise most.

A Gaussian process foresees fitness from the expressions that have been judged, as evolution with a metamodel does
(Emmerich, Giannakoglou and Naujoks 2006). Two expressions are alike as far as they give layers, and channels, like
scores, so they are compared by the logarithms of their scores on the networks at hand; in these an expression is linear
in its exponents. Nothing is run or measured for it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist, pdist

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


def promising(
    expressions: Sequence[str], judged: Mapping[str, float], networks: Sequence[Sequence[_Layer]], count: int
) -> list[str]:
    """The `count` of `expressions` with the highest upper confidence bound of fitness, the highest first.

    `judged` has the fitness of others, and `networks` the layers of each network. As long as next to nothing has been
    judged, the first.
    """
    new = [each for each in dict.fromkeys(expressions) if each not in judged] or list(expressions)
    if len(judged) < _ENOUGH:
        return new[:count]
    points = _points([*judged, *new], networks)
    seen, asked = np.split(points, [len(judged)])
    fitness = np.array(list(judged.values()))
    mean, deviation = _foreseen(seen, (fitness - fitness.mean()) / (fitness.std() or 1.0), asked)
    order = np.argsort(-(mean + _CURIOSITY * deviation), kind="stable")
    return [new[place] for place in order[:count]]


def _foreseen(seen: np.ndarray, values: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (Q,) at `asked` (Q, D), of what has `values` (N,) at `seen` (N, D).

    Eqs. 2.25 and 2.26 of Rasmussen and Williams 2006, with a squared exponential as the covariance, whose length is the
    median distance between what was seen.
    """
    square = float(np.median(pdist(seen, "sqeuclidean"))) or 1.0
    covariance = np.exp(-cdist(seen, seen, "sqeuclidean") / (2 * square)) + _NOISE * np.eye(len(seen))
    across = np.exp(-cdist(asked, seen, "sqeuclidean") / (2 * square))
    factor = cho_factor(covariance)
    variance = 1 - np.einsum("qn,nq->q", across, cho_solve(factor, across.T))
    return across @ cho_solve(factor, values), np.sqrt(np.maximum(variance, 0.0))


def _points(expressions: Sequence[str], networks: Sequence[Sequence[_Layer]]) -> np.ndarray:
    """Logarithms of the scores that `expressions` give, (E, D), up to a factor; of each network the layers, from their
    mean, then the channels of each layer, from theirs. A squared distance is a mean over layers, beside which channels
    count by `_OF_CHANNELS`."""
    powers = [_exponents(expression) for expression in expressions]
    keys = sorted({key for each in powers for key in each})
    columns = [np.concatenate([_logarithms(key, layers) for layers in networks]) for key in keys]
    return np.array([[each.get(key, 0.0) for key in keys] for each in powers]) @ np.array(columns)


_exponents = lru_cache(4096)(exponents)  # all but a few are asked for again with the next candidate


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
    relation, value = compared[0], ast.literal_eval(compared[1])
    return bool(layer[name] > value if relation == ">" else layer[name] == value)
