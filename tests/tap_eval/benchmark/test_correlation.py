"""Coefficients are those of the formulas, within ranges of size and over all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget, spent
from tap_eval.allocation.choices import Choices
from tap_eval.benchmark.correlation import correlate, expected_losses, foretelling, kendall, noise, spearman
from tap_eval.measuring.bench import Bench
from tap_eval.quantization.quantizer import Allocation


def test_coefficients_are_those_of_the_formulas_in_the_mean_over_strata() -> None:
    rng = np.random.default_rng(0)
    strata = np.repeat([0, 1, 2], [30, 40, 50])
    measured = rng.normal(size=120) - 5 * strata  # size alone foretells much
    foretold = measured + rng.normal(size=120)
    found = correlate(foretold.tolist(), measured.tolist(), strata.tolist(), seed=0)
    rows = [strata == place for place in range(3)]
    assert found.spearman.value == pytest.approx(np.mean([spearmanr(foretold[its], measured[its])[0] for its in rows]))
    assert found.kendall.value == pytest.approx(np.mean([kendalltau(foretold[its], measured[its])[0] for its in rows]))
    assert found.overall_spearman.value == pytest.approx(spearmanr(foretold, measured)[0])
    assert found.overall_kendall.value == pytest.approx(kendalltau(foretold, measured)[0])
    assert foretelling(foretold.tolist(), measured.tolist(), strata.tolist()) == found.spearman.value
    for each in (found.spearman, found.kendall, found.overall_spearman, found.overall_kendall):
        assert each.low < each.value < each.high
    assert found.overall_spearman.value > found.spearman.value + 0.1
    by_size = correlate((-strata).tolist(), measured.tolist(), strata.tolist(), seed=0)
    assert by_size.spearman.value == 0
    assert by_size.overall_spearman.value > 0.9


def test_samples_with_ties_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 4, (2, 30)).astype(float)
    samples = rng.integers(0, 30, (5, 30))
    assert kendall(x, y, samples) == pytest.approx([kendalltau(x[each], y[each])[0] for each in samples])
    assert spearman(x[samples], y[samples]) == pytest.approx([spearmanr(x[each], y[each])[0] for each in samples])
    assert kendall(x, np.ones(30), samples).tolist() == spearman(x[samples], np.ones((5, 30))).tolist() == [0] * 5


@pytest.mark.parametrize(("strata", "each", "rho"), [(1, 100, 0.58), (8, 62, 0.95), (8, 25, 0.93), (8, 25, 0.5)])
def test_the_interval_holds_the_true_figure_about_as_often_as_it_says(strata: int, each: int, rho: float) -> None:
    """Of normal variables, whose coefficients are known by their correlation (Pearson 1907)."""
    r = 2 * np.sin(np.pi * rho / 6)
    held, times = np.zeros(4), 60
    for seed in range(times):
        x, y = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, r], [r, 1]], strata * each).T
        found = correlate(x.tolist(), y.tolist(), np.repeat(range(strata), each).tolist(), seed)
        tau = 2 / np.pi * np.arcsin(r)
        of = [(found.spearman, rho), (found.overall_spearman, rho), (found.kendall, tau), (found.overall_kendall, tau)]
        held += [interval.low < true < interval.high for interval, true in of]
    assert (held >= 0.85 * times).all(), held


def test_what_is_expected_is_what_the_allocator_makes_least(bench: Bench) -> None:
    choices, budget = Choices((2, 8)), Budget.parse("3.5bit")
    scores = [5.0, 1.0, 0.3, 2.0, 0.1, 9.0, 1.5, 0.7, 4.0, 2.5]
    best = allocate(scores, bench.layers, choices, budget)
    all_of_them = [
        Allocation(bits, (8,) * len(scores)) for bits in itertools.product(choices.weights, repeat=len(scores))
    ]
    within = [each for each in all_of_them if spent(each, bench.layers, budget) <= budget.limit(bench.layers)]
    assert expected_losses(scores, noise(within)).min() == pytest.approx(expected_losses(scores, noise([best]))[0])
