"""The relaxed knapsack, against a linear program."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.relaxation import Relaxation
from tap_eval.allocation.score import importance
from tests.tap_eval.allocation.layers import make_layers

LAYERS = make_layers(40, 120, 400, 800, 80)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("budget", ["3bit", "2.1bit", "85%", "0.73KB", "0.3MBOPs", "8bit"])
@pytest.mark.parametrize("choices", [Choices((2, 3, 4, 8)), Choices((2, 4, 8), (4, 8)), Choices(pin_ends=True)])
def test_the_least_loss_is_that_of_a_linear_program(choices: Choices, budget: str, groups: int) -> None:
    within = Budget.parse("5bit" if choices.pin_ends and budget == "2.1bit" else budget)
    logarithms = np.random.default_rng(0).normal(0, 2, (20, len(LAYERS), groups))
    found = Relaxation(LAYERS, choices, within).errors(logarithms)
    assert found.shape == (20, len(LAYERS))
    least = np.array([min(4.0**-weight + 4.0**-act for weight, act in choices.of(layer)) for layer in LAYERS])
    most = np.array([max(4.0**-weight + 4.0**-act for weight, act in choices.of(layer)) for layer in LAYERS])
    assert (found <= 1 + 1e-12).all()
    assert (found >= least / most - 1e-12).all()
    for row, its in zip(logarithms, found, strict=True):
        weights = importance(np.exp(row).ravel()).reshape(row.shape)
        if groups == 1:
            assert its * most @ weights[:, 0] == pytest.approx(_program(weights, choices, within), rel=1e-6)
        else:  # by the errors of layers alone their groups cannot be weighed
            assert its @ most >= _program(np.ones_like(weights), choices, within) - 1e-9


def test_equal_groups_are_one() -> None:
    relaxation = Relaxation(LAYERS, Choices((2, 3, 4, 8), channel_groups=4), Budget.parse("3bit"))
    logarithms = np.random.default_rng(1).normal(0, 2, (5, len(LAYERS), 1))
    np.testing.assert_allclose(relaxation.errors(logarithms), relaxation.errors(logarithms.repeat(4, 2)), rtol=1e-6)


def test_layers_keep_about_the_errors_of_the_exact_allocation() -> None:
    """Many layers, of which no single one decides."""
    layers, choices, budget = make_layers(*range(100, 160)), Choices((2, 3, 4, 8)), Budget.parse("3bit")
    logarithms = np.random.default_rng(2).normal(0, 2, (1, len(layers), 1))
    bits = allocate(np.exp(logarithms[0, :, 0]).tolist(), layers, choices, budget).weights
    exact = [(4.0**-each + 4.0**-8) / (4.0**-2 + 4.0**-8) for each in bits if isinstance(each, int)]
    errors = Relaxation(layers, choices, budget).errors(logarithms)[0]
    assert np.abs(errors - exact).max(initial=0) < 1
    assert (np.abs(errors - exact) > 1e-3).sum() <= 6  # of 60
    assert errors.mean() == pytest.approx(np.mean(exact), abs=0.02)


def _program(weights: np.ndarray, choices: Choices, budget: Budget) -> float:
    """The least sum of importance times error, where choices may be taken in parts."""
    groups = weights.shape[1]
    losses, costs, owners = [], [], []
    for place, layer in enumerate(LAYERS):
        for group in range(groups):
            for weight, activation in budget.options(layer, choices):
                losses.append(weights[place, group] * (4.0**-weight + 4.0**-activation) / groups)
                costs.append(budget.cost(layer, weight, activation) / groups)
                owners.append(place * groups + group)
    whole = np.array([[owner == unit for owner in owners] for unit in range(len(LAYERS) * groups)], float)
    solved = linprog(losses, A_ub=[costs], b_ub=[budget.limit(LAYERS)], A_eq=whole, b_eq=np.ones(len(whole)))
    assert solved.success
    return float(solved.fun)
