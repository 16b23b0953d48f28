"""Accuracy with its interval, and the distance of outputs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tap_eval.measuring.accuracy import Accuracy, Measurement, divergence, mean_kl


def test_the_distance_of_outputs_is_the_kl_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert mean_kl(p.log(), q.log()) == pytest.approx(0.25 * math.log(2))
    assert mean_kl(p.log(), p.log() + 3) == pytest.approx(0, abs=1e-12)


def test_accuracy_carries_the_wilson_interval() -> None:
    low, high = Accuracy(80, 100).interval
    assert (low, high) == pytest.approx((0.7112, 0.8666), abs=1e-4)
    assert str(Accuracy(2000, 2500)) == "80.0 % (78.4 to 81.5, n = 2,500)"


def test_what_images_say_goes_through_json_and_is_joined_in_their_order() -> None:
    torch.manual_seed(0)
    reference, logits, labels = torch.randn(21, 5), torch.randn(21, 5), torch.randint(5, (21,))
    whole = Measurement.of(logits, reference, labels)
    there = Measurement.unpacked(json.loads(json.dumps(whole.packed())))
    parts = [Measurement.of(logits[part], reference[part], labels[part]) for part in (slice(8), slice(8, None))]
    for found in (there, Measurement.joined(parts)):
        assert np.array_equal(found.correct, whole.correct)
        assert np.array_equal(found.kl, whole.kl)
    assert whole.accuracy == Accuracy(int((logits.argmax(1) == labels).sum()), 21, whole.mean_kl)
    assert whole.mean_kl == pytest.approx(mean_kl(reference, logits), rel=1e-6)


def test_outputs_that_are_no_numbers_are_far_and_classes_that_are_excluded_count_nothing() -> None:
    reference = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    logits = torch.tensor([[0.0, math.log(3), -torch.inf], [0.0, torch.nan, 0.0]])
    near, far = divergence(reference, logits).tolist()
    assert near == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert far == 1000
    for label in (0, 1, 2):  # the place of what is no number is not an answer
        seen = Measurement.of(logits, reference, torch.tensor([1, label]))
        assert seen.correct.tolist() == [True, False]
