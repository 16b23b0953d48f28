"""What of a proxy's answer are scores, and how the rest is called."""

from __future__ import annotations

import math

import pytest

from tap_eval.proxies.proxy import Failure, Rejection, checked_scores


@pytest.mark.parametrize(
    ("value", "failure"),
    [
        (None, Failure.WRONG_SHAPE), ([1.0], Failure.WRONG_SHAPE), ([1.0, "a"], Failure.WRONG_SHAPE),
        ([1.0, True], Failure.WRONG_SHAPE), ([1.0, [1.0]], Failure.WRONG_SHAPE), ([1.0, math.nan], Failure.NOT_FINITE),
        ([1.0, [1.0, math.inf]], Failure.NOT_FINITE), ([1, 2**1100], Failure.NOT_FINITE),
        ([1.0, [1e308, 1e308]], Failure.NOT_FINITE), ([1.0, 1.0], Failure.CONSTANT), ([2, [2, 2]], Failure.CONSTANT),
    ],
)  # fmt: skip
def test_scores_that_are_none_die_by_their_name(value: object, failure: Failure) -> None:
    found = checked_scores(value, [1, 2], by_channel=True)
    assert isinstance(found, Rejection)
    assert found.failure is failure


def test_scores_may_be_of_layers_or_of_channels() -> None:
    assert checked_scores([1, [2, 3.5]], [1, 2], by_channel=True) == [1.0, [2.0, 3.5]]
    assert checked_scores([1, [2, 3.5]], [1, 2], by_channel=False) == [1.0, 2.75]
    alike = checked_scores([[1, 3], [2, 2]], [2, 2], by_channel=False)
    assert isinstance(alike, Rejection)
    assert alike.failure is Failure.CONSTANT
