"""Proxies that come with the program."""

from __future__ import annotations

import math

import pytest

from tap_eval.proxies.published import NAMES, module, published
from tools.sandbox import MontySandbox

LAYERS = [
    {"index": index, "weight_l2": 1.5 + index, "activation_entropy": 3.0 / (1 + index), "activation_power": 4.0}
    for index in range(3)
]


def test_the_formula_of_the_paper() -> None:
    expected = [(1.5 + i) * 3.0 / (1 + i) * math.exp(-2.0 / (i + 1)) for i in range(3)]
    assert module("paper").sensitivity(LAYERS, {}) == pytest.approx(expected)


@pytest.mark.parametrize("name", NAMES)
def test_each_says_where_it_is_from(name: str) -> None:
    proxy = published(name)
    assert len(proxy.thought.splitlines()) > 2
    assert proxy.thought in proxy.code


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_in_the_sandbox_as_it_does_here(name: str) -> None:
    with MontySandbox() as sandbox:
        found = sandbox.run(published(name).code, "sensitivity(layers, task)", {"layers": LAYERS, "task": {}})
    assert found == pytest.approx(module(name).sensitivity(LAYERS, {}))
