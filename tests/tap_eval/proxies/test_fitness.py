"""What a proxy is worth."""

from __future__ import annotations

import random

import pytest
from scipy.stats import spearmanr

from tap_eval.proxies.fitness import FitnessWeights, fitness, novelty, rank_correlation


def test_fitness_is_equation_6() -> None:
    assert fitness([0.5], [0.8], FitnessWeights(), cost=0, novelty=0) == pytest.approx(0.1 * 0.5 + 0.9 * 0.8)
    weights = FitnessWeights(alpha=0.5, beta=0.1, gamma=0.2)
    assert fitness([1, 0], [1, 0.5], weights, cost=1, novelty=0.5) == pytest.approx(0.25 + 0.375 - 0.1 + 0.1)


def test_ranks_and_novelty() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    rng = random.Random(0)
    for _ in range(50):
        scores, errors = ([rng.choice((rng.random(), 0.5)) for _ in range(9)] for _ in range(2))
        assert rank_correlation(scores, errors) == float(spearmanr(scores, errors)[0])  # to the last digit
    assert novelty([[1, 2, 3]], []) == 1
    assert novelty([[1, 2, 3]], [[[3, 2, 1]]]) == pytest.approx(0)
