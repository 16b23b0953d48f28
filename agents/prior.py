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
    def _networks(self) -> list[tuple[_Scores, list[tuple[Bench, Relaxation]]]]:
        """Each with its budgets."""
        found: dict[str, tuple[_Scores, list[tuple[Bench, Relaxation]]]] = {}
        for bench in self._benches:
            relaxation = Relaxation(bench.layers, bench.task.choices, bench.task.budget)
            scores = _Scores(bench.features, bench.task.choices.channel_groups)
            found.setdefault(bench.digest, (scores, []))[1].append((bench, relaxation))
        return list(found.values())

    def __call__(self, expressions: Sequence[Powers]) -> np.ndarray:
        """The fitness (Q,) of each, without its optional terms; `exp(-KL)` is in place of whatever else counts."""
        fitness = np.zeros(len(expressions))
        for scores, alike in self._networks:
            of_layers = scores.of_layers(expressions)
            units, ranks = of_layers[:, :, None] + scores.of_groups(expressions), rankdata(of_layers, axis=1)
            for bench, relaxation in alike:
                worth = np.exp(-relaxation.errors(units) @ bench.layer_errors)
                rho = _correlations(ranks, rankdata(bench.layer_errors))
                fitness += self._weights.alpha * rho + self._weights.share * worth
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


class _Scores:
    """Logarithms of the scores that expressions give one network; those of a feature are taken once."""

    def __init__(self, layers: Sequence[Layer], groups: int) -> None:
        self._layers = layers
        self._groups = groups
        self._features: dict[str, np.ndarray] = {}
        self._channels: dict[str, list[np.ndarray]] = {}

    def of_layers(self, expressions: Sequence[Powers]) -> np.ndarray:
        """(Q, L)."""
        keys = _keys(expressions, False)
        for key in keys:
            if key not in self._features:
                self._features[key] = logarithms(key, self._layers)
        columns = np.array([self._features[key] for key in keys]).reshape(len(keys), len(self._layers))
        found: np.ndarray = matrix(expressions, keys).reshape(len(expressions), len(keys)) @ columns
        return found

    def of_groups(self, expressions: Sequence[Powers]) -> np.ndarray:
        """Of groups of channels, of like scores, over those of their layers (Q, L, G)."""
        keys = _keys(expressions, True)
        if self._groups == 1 or not keys:
            return np.zeros((len(expressions), len(self._layers), 1))
        for key in keys:
            if key not in self._channels:
                name = key.removeprefix(CHANNEL)
                self._channels[key] = [floored(layer["channels"][name]) for layer in self._layers]
        kinds, which = np.unique(matrix(expressions, keys), axis=0, return_inverse=True)
        found = np.zeros((len(kinds), len(self._layers), self._groups))
        for place in range(len(self._layers)):
            scores = kinds @ np.array([self._channels[key][place] for key in keys])
            scores = np.sort(np.exp(scores - scores.max(1, keepdims=True)), axis=1)
            size, longer = divmod(scores.shape[1], self._groups)  # cut as `np.array_split` does
            ends = np.cumsum([0] + [size + 1] * longer + [size] * (self._groups - longer))
            starts = np.minimum(ends[:-1], scores.shape[1] - 1)
            means = np.add.reduceat(scores, starts, axis=1) / np.maximum(np.diff(ends), 1)
            found[:, place] = np.log(means / scores.mean(1, keepdims=True))
        return found[which.ravel()]


def _keys(expressions: Sequence[Powers], channels: bool) -> list[str]:
    return sorted({key for each in expressions for key in each if key.startswith(CHANNEL) == channels})


def _correlations(rows: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Of each of `rows` (Q, L), which are ranks, with `ranks` (L,); 0 where either is constant."""
    rows, ranks = rows - rows.mean(1, keepdims=True), ranks - ranks.mean()
    lengths = np.sqrt((rows**2).sum(1) * (ranks**2).sum())
    found: np.ndarray = rows @ ranks / np.where(lengths, lengths, 1.0)
    return found


def _holds(condition: str, layer: Layer) -> bool:
    """One of `prompts.expression.BOOSTS`."""
    name, *compared = condition.split()
    if not compared:
        return bool(layer[name])
    relation, value = compared[0], json.loads(compared[1].replace("'", '"'))
    return bool(layer[name] > value if relation == ">" else layer[name] == value)
