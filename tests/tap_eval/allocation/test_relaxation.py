"""The relaxed knapsack, against a linear program."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.latency import PICOSECONDS, Latencies
from tap_eval.allocation.relaxation import Relaxation
from tap_eval.allocation.score import importance
from tests.tap_eval.allocation.layers import make_layers

LAYERS = make_layers(40, 120, 400, 800, 80)
MS = {2: 0.2, 3: 0.25, 4: 0.1, 8: 0.3}
"""of every layer: two bits are slower than four"""
LATENCIES = Latencies(
    "device.csv",
    "",
    {
        (layer.name, bits, act): round(MS[bits] * act * PICOSECONDS / 8)
        for layer in LAYERS
        for bits in MS
        for act in (4, 8)
    },
)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("budget", ["3bit", "2.1bit", "85%", "0.73KB", "0.3MBOPs", "8bit", "2bit", "1.1ms", "0.71ms"])
@pytest.mark.parametrize("choices", [Choices((2, 3, 4, 8)), Choices((2, 4, 8), (4, 8)), Choices(pin_ends=True)])
def test_errors_are_those_of_a_linear_program(choices: Choices, budget: str, groups: int) -> None:
    within = Budget.parse("5bit" if choices.pin_ends and budget in ("2.1bit", "2bit", "0.71ms") else budget)
    within = within.beside(0, latencies=LATENCIES)
    logarithms = np.random.default_rng(0).normal(0, 2, (20, len(LAYERS), groups))
    found = Relaxation(LAYERS, choices, within).errors(logarithms)
    for row, its in zip(logarithms, found, strict=True):
        weights = importance(np.exp(row).ravel()).reshape(row.shape)
        np.testing.assert_allclose(its * 4.0 ** -min(choices.weights), _program(weights, choices, within), atol=1e-7)


def test_equal_groups_are_one() -> None:
    relaxation = Relaxation(LAYERS, Choices((2, 3, 4, 8), channel_groups=4), Budget.parse("3bit"))
    logarithms = np.random.default_rng(1).normal(0, 2, (5, len(LAYERS), 1))
    np.testing.assert_allclose(relaxation.errors(logarithms), relaxation.errors(logarithms.repeat(4, 2)), rtol=1e-6)


def test_layers_keep_about_the_errors_of_the_exact_allocation() -> None:
    """Many layers, of which no single one decides."""
    layers, choices, budget = make_layers(*range(100, 160)), Choices((2, 3, 4, 8)), Budget.parse("3bit")
    logarithms = np.random.default_rng(2).normal(0, 2, (1, len(layers), 1))
    bits = allocate(np.exp(logarithms[0, :, 0]).tolist(), layers, choices, budget).weights
    exact = [(4.0**-each + 4.0**-8) / 4.0**-2 for each in bits if isinstance(each, int)]
    errors = Relaxation(layers, choices, budget).errors(logarithms)[0]
    assert np.abs(errors - exact).max(initial=0) < 1
    assert (np.abs(errors - exact) > 1e-3).sum() <= 6  # of 60
    assert errors.mean() == pytest.approx(np.mean(exact), abs=0.02)


def _program(weights: np.ndarray, choices: Choices, budget: Budget) -> np.ndarray:
    """Errors (L,) of least sum with importance, where choices may be taken in parts."""
    groups = weights.shape[1]
    errors, costs, owners = [], [], []
    for place, layer in enumerate(LAYERS):
        for group in range(groups):
            for weight, activation in budget.options(layer, choices):
                errors.append((4.0**-weight + 4.0**-activation) / groups)
                costs.append(budget.cost(layer, weight, activation) / groups)
                owners.append(place * groups + group)
    whole = np.array([[owner == unit for owner in owners] for unit in range(len(LAYERS) * groups)], float)
    scale, losses = max(costs), weights.ravel()[owners] * errors
    limit = budget.limit(LAYERS) / scale
    solved = linprog(losses, A_ub=[np.array(costs) / scale], b_ub=[limit], A_eq=whole, b_eq=np.ones(len(whole)))
    assert solved.success
    return np.bincount(np.array(owners) // groups, solved.x * errors)
