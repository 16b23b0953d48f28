"""What a proxy is worth."""

from __future__ import annotations

import math
import random

import pytest
from scipy.stats import spearmanr

from tap_eval.proxies.fitness import FitnessWeights, novelty, rank_correlation


def test_fitness_is_equation_6() -> None:
    weights = FitnessWeights()
    assert weights.offset([0.5]) + weights.worth_term([0.8], [9]) == pytest.approx(0.1 * 0.5 + 0.9 * 0.8)
    weights = FitnessWeights(alpha=0.5, beta=0.1, gamma=0.2)
    assert weights.offset([1, 0], cost=1, novelty=0.5) == pytest.approx(0.25 - 0.1 + 0.1)
    assert weights.worth_term([1, 0.5], [9, 9]) == pytest.approx(0.375)
    divergent = FitnessWeights(worth="kl")
    assert divergent.worth_term([0, 0], [math.log(2), 0]) == pytest.approx(0.9 * 0.75)


def test_ranks_and_novelty() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    rng = random.Random(0)
    for _ in range(50):
        scores, errors = ([rng.choice((rng.random(), 0.5)) for _ in range(9)] for _ in range(2))
        assert rank_correlation(scores, errors) == float(spearmanr(scores, errors)[0])  # to the last digit
    assert novelty([[1, 2, 3]], []) == 1
    assert novelty([[1, 2, 3]], [[[3, 2, 1]]]) == pytest.approx(0)
