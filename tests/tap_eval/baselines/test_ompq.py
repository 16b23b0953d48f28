"""OMPQ's orthogonality and its linear programme."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from tap_eval.baselines.ompq import fill, gains, linear_cka

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(12, size, generator=GENERATOR, dtype=torch.float64) for size in (5, 7))


def cka(*features: torch.Tensor) -> torch.Tensor:
    return linear_cka(torch.stack([x @ x.T for x in features]))


def test_cka_does_not_change_by_rotations_scales_and_shifts_but_by_what_mixes_axes_unevenly() -> None:
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=GENERATOR, dtype=torch.float64))[0]
    known = float(cka(X, Y)[0, 1])
    assert 0 < known < 1
    for same in (X @ rotation, 3 * X, X + torch.arange(5.0), torch.cat([X, X], 1)):
        found = cka(same, Y)
        assert float(found[0, 1]) == pytest.approx(known)
        assert torch.allclose(found, found.T)
        assert torch.allclose(found.diagonal(), torch.ones(2, dtype=torch.float64))
        assert float(cka(X, same)[0, 1]) == pytest.approx(1)
    assert float(cka(X * torch.tensor([9.0, 1, 1, 1, 1]), Y)[0, 1]) != pytest.approx(known)


def test_cka_of_orthogonal_features_is_0_and_of_one_axis_the_squared_correlation() -> None:
    first, second = X[:, :1], Y[:, :1]
    assert float(cka(first, second)[0, 1]) == pytest.approx(np.corrcoef(first[:, 0], second[:, 0])[0, 1] ** 2)
    centred = first - first.mean()
    apart = (second - second.mean()) - (centred.T @ (second - second.mean())) / centred.square().sum() * centred
    assert float(cka(first, apart)[0, 1]) == pytest.approx(0, abs=1e-12)
    assert float(cka(first, torch.ones(12, 3, dtype=torch.float64))[0, 1]) == 0


def test_gains_are_the_formula_up_to_a_factor() -> None:
    orthogonality = np.array([[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]])
    theta = np.exp(-2 * np.array([0.6, 0.8, 1.0]))
    expected = np.array([theta.mean(), theta[1:].mean(), theta[2]])
    found = gains(orthogonality, beta=2)
    assert found / found[0] == pytest.approx(expected / expected[0])
    deep = gains(np.ones((500, 500)), beta=10)
    assert deep == pytest.approx(np.ones(500))


def test_bits_are_those_of_the_linear_programme_but_for_the_layer_that_it_cuts() -> None:
    rng = np.random.default_rng(0)
    gain, sizes = rng.random(8), rng.integers(10, 100, 8)
    limit = int(2.7 * sizes.sum())
    relaxed = linprog(-gain, A_ub=[sizes], b_ub=[limit], bounds=[(2, 4)] * 8).x
    order = np.argsort(-gain / sizes).tolist()
    found = fill(order, [[2, 3, 4]] * 8, lambda bits: int(np.dot(bits, sizes)) <= limit)
    assert np.dot(found, sizes) <= limit
    whole = np.isclose(relaxed, np.round(relaxed))
    assert whole.sum() == 7
    cut = order.index(int(np.flatnonzero(~whole)[0]))
    assert [found[layer] for layer in order[:cut]] == [4] * cut
    assert found[order[cut]] == int(relaxed[order[cut]])
