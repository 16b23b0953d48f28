"""HAWQ-V3's integer programme against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tap_eval.baselines.hawq_v3 import programme
from tap_eval.mistake import BudgetMistake


@pytest.mark.parametrize("seed", range(8))
def test_the_programme_finds_the_best_of_all_that_is_within_the_limit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = [(2, 4, 8)] * 4 + [(8,)]  # the last is pinned
    sizes, weights = rng.integers(100, 10**6, 5).tolist(), 10 ** rng.uniform(-6, 0, 5)
    costs = [[size * each for each in its] for size, its in zip(sizes, bits, strict=True)]
    losses = [[float(weight) * 4.0**-each for each in its] for weight, its in zip(weights, bits, strict=True)]
    limit = int(rng.uniform(0.3, 0.9) * sum(each[-1] for each in costs))

    def total(table: list[list[float]] | list[list[int]], taken: tuple[int, ...]) -> float:
        return sum(each[place] for each, place in zip(table, taken, strict=True))

    every = [taken for taken in itertools.product(*(range(len(each)) for each in bits)) if total(costs, taken) <= limit]
    if not every:
        with pytest.raises(BudgetMistake, match="finds no bits within the budget"):
            programme(losses, costs, limit)
        return
    best = min(every, key=lambda taken: total(losses, taken))
    choices, least = programme(losses, costs, limit)
    found = tuple(choices)
    assert least
    assert total(costs, found) <= limit
    assert total(losses, found) == pytest.approx(total(losses, best), rel=1e-9)


def test_not_a_bit_above_a_limit_that_the_best_choice_just_misses() -> None:
    size = 10**9
    losses, costs = [[1.0, 0.0], [1.0, 0.5]], [[size, 2 * size], [size, 2 * size]]
    assert programme(losses, costs, 3 * size)[0] == [1, 0]
    assert programme(losses, costs, 3 * size - 1)[0] == [0, 0]
    assert programme(losses, costs, 4 * size)[0] == [1, 1]
