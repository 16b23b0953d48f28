"""Accuracy with its interval, and the distance of outputs."""

from __future__ import annotations

import math

import pytest
import torch

from tap_eval.measuring.accuracy import Accuracy, mean_kl


def test_the_distance_of_outputs_is_the_kl_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert mean_kl(p.log(), q.log()) == pytest.approx(0.25 * math.log(2))
    assert mean_kl(p.log(), p.log() + 3) == pytest.approx(0, abs=1e-12)


def test_accuracy_carries_the_wilson_interval() -> None:
    low, high = Accuracy(80, 100).interval
    assert (low, high) == pytest.approx((0.7112, 0.8666), abs=1e-4)
    assert str(Accuracy(2000, 2500)) == "80.0 % (78.4 to 81.5, n = 2,500)"
