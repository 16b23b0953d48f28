"""What fitness an expression should have, before anything like it was measured.

What an allocation costs is nearly what it costs to round each layer alone, added up, and these layer errors are
measured once a network for Eq. 6. An error falls fourfold a bit, as in the allocator. So fitness can be foretold of any
expression, of which the scores are computed here: no code is run, and nothing is measured. No agent is told.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import rankdata

from prompts.expression import CHANNEL
from tap_eval.allocation.relaxation import Relaxation
from tap_eval.measuring.bench import Bench
from tap_eval.proxies.fitness import FitnessWeights

Layer = Mapping[str, Any]
"""features of a layer"""
Powers = Mapping[str, float]
"""an expression, as `prompts.expression.exponents` has it"""
_LEAST = 1e-9
"""what the code of an expression raises a feature to"""


class Prior:
    """Of fitness on networks."""

    def __init__(self, benches: Sequence[Bench], weights: FitnessWeights) -> None:
        self._benches = benches
        self._weights = weights

    @cached_property
    def _networks(self) -> list[list[tuple[Bench, Relaxation]]]:
        """Each with its budgets."""
        found: dict[str, list[tuple[Bench, Relaxation]]] = {}
        for bench in self._benches:
            relaxation = Relaxation(bench.layers, bench.task.choices, bench.task.budget)
            found.setdefault(bench.digest, []).append((bench, relaxation))
        return list(found.values())

    def __call__(self, expressions: Sequence[Powers]) -> np.ndarray:
        """The fitness (Q,) of each, without its optional terms; `exp(-KL)` is in place of whatever else counts."""
        fitness = np.zeros(len(expressions))
        for alike in self._networks:
            bench = alike[0][0]
            of_layers = _logarithms(expressions, bench.features)
            units = of_layers[:, :, None] + _shares(expressions, bench.features, bench.task.choices.channel_groups)
            for its, relaxation in alike:
                worth = np.exp(-relaxation.errors(units) @ its.layer_errors)
                rho = _rank_correlations(of_layers, np.array(its.layer_errors))
                fitness += self._weights.alpha * rho + (1 - self._weights.alpha) * worth
        return fitness / len(self._benches)


def logarithms(key: str, layers: Sequence[Layer]) -> np.ndarray:
    """What a power of 1 of `key`, none of channels, adds to the logarithms of scores (L,)."""
    if key == "exp":
        return np.array([layer["depth"] for layer in layers])
    if key.startswith("if "):
        return math.log(2) * np.array([_holds(key.removeprefix("if "), layer) for layer in layers])
    return floored([layer[key] for layer in layers])


def floored(values: Sequence[float]) -> np.ndarray:
    """Logarithms of a feature."""
    return np.log(np.maximum(values, _LEAST))


def matrix(expressions: Sequence[Powers], keys: Sequence[str]) -> np.ndarray:
    """Their powers (Q, K)."""
    return np.array([[each.get(key, 0.0) for key in keys] for each in expressions])


def _keys(expressions: Sequence[Powers], channels: bool) -> list[str]:
    return sorted({key for each in expressions for key in each if key.startswith(CHANNEL) == channels})


def _logarithms(expressions: Sequence[Powers], layers: Sequence[Layer]) -> np.ndarray:
    """Of the scores of layers (Q, L)."""
    found = np.zeros((len(expressions), len(layers)))
    for key, powers in zip(keys := _keys(expressions, False), matrix(expressions, keys).T, strict=True):
        found += np.outer(powers, logarithms(key, layers))
    return found


def _shares(expressions: Sequence[Powers], layers: Sequence[Layer], groups: int) -> np.ndarray:
    """Logarithms of the scores of groups of channels, of like scores, over those of their layers (Q, L, G)."""
    keys = _keys(expressions, True)
    if groups == 1 or not keys:
        return np.zeros((len(expressions), len(layers), 1))
    kinds, which = np.unique(matrix(expressions, keys), axis=0, return_inverse=True)
    found = np.zeros((len(kinds), len(layers), groups))
    for place, layer in enumerate(layers):
        columns = np.array([floored(layer["channels"][key.removeprefix(CHANNEL)]) for key in keys])
        scores = kinds @ columns
        scores = np.sort(np.exp(scores - scores.max(1, keepdims=True)), axis=1)
        parts = np.array_split(scores, min(groups, scores.shape[1]), axis=1)
        parts += parts[-1:] * (groups - len(parts))
        means = np.stack([part.mean(1) for part in parts], axis=1)
        found[:, place] = np.log(means / scores.mean(1, keepdims=True))
    return found[which.ravel()]


def _rank_correlations(rows: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Spearman's rho of each of `rows` (Q, L) with `errors` (L,); 0 where either is constant."""
    ranks, theirs = rankdata(rows, axis=1), rankdata(errors)
    ranks, theirs = ranks - ranks.mean(1, keepdims=True), theirs - theirs.mean()
    lengths = np.sqrt((ranks**2).sum(1) * (theirs**2).sum())
    return ranks @ theirs / np.where(lengths, lengths, 1.0)


def _holds(condition: str, layer: Layer) -> bool:
    """One of `prompts.expression.BOOSTS`."""
    name, *compared = condition.split()
    if not compared:
        return bool(layer[name])
    relation, value = compared[0], json.loads(compared[1].replace("'", '"'))
    return bool(layer[name] > value if relation == ">" else layer[name] == value)
