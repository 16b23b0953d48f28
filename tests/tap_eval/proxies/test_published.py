"""Proxies that come with the program."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tap_eval import quantize
from tap_eval.preparing.prepare import prepare
from tap_eval.proxies.features import describe
from tap_eval.proxies.published import NAMES, module, published
from tools.sandbox import MontySandbox

LAYERS = [
    {
        "index": index, "out_channels": 2, "params": 72 if index else 144,
        "weight_l2": 1.5 + index,
        "input_mean": 0.25, "input_std": 0.5,
        "activation_entropy": 3.0 / (1 + index), "activation_power": 4.0, "activation_std": 2.0,
        "channels": {"weight_absmax": [0.5, 0.25 + index]},
    }
    for index in range(3)
]  # fmt: skip


def test_the_formula_of_the_paper() -> None:
    expected = [(1.5 + i) * 3.0 / (1 + i) * math.exp(-2.0 / (i + 1)) for i in range(3)]
    assert module("paper").sensitivity(LAYERS, {}) == pytest.approx(expected)


def test_noise_of_channels_grows_with_the_square_of_their_range() -> None:
    first, second, _ = module("channel_noise").sensitivity(LAYERS, {})
    assert first == pytest.approx([0.5**2 * 72 * 0.3125 / 4, 0.25**2 * 72 * 0.3125 / 4])
    assert second == pytest.approx([0.5**2 * 36 * 0.3125 / 4, 1.25**2 * 36 * 0.3125 / 4]), "half of the fan-in"


def test_the_fan_in_of_a_kernel_that_is_no_square_is_that_of_its_weights() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, (1, 7)), nn.Flatten(), nn.Linear(8 * 6 * 3, 4))
    prepared = prepare(network.eval(), torch.rand(2, 3, 6, 9))
    features = describe(prepared, torch.rand(4, 3, 6, 9), "statistics", 2**20, (2, 4))
    first, _ = module("channel_noise").sensitivity(features, {})
    layer = features[0]
    energy = (layer["input_std"] ** 2 + layer["input_mean"] ** 2) / layer["activation_std"] ** 2
    assert first == pytest.approx([high**2 * 21 * energy for high in layer["channels"]["weight_absmax"]], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_each_can_be_applied_by_its_name(name: str, network: nn.Module) -> None:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    quantized = quantize(network, images, "3bit", name, finished=False)
    assert len(set(quantized.allocation.weights)) > 1


@pytest.mark.parametrize("name", NAMES)
def test_each_says_where_it_is_from(name: str) -> None:
    proxy = published(name)
    assert len(proxy.thought.splitlines()) > 2
    assert proxy.thought in proxy.code


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_in_the_sandbox_as_it_does_here(name: str) -> None:
    with MontySandbox() as sandbox:
        found = sandbox.run(published(name).code, "sensitivity(layers, task)", {"layers": LAYERS, "task": {}})
    expected = module(name).sensitivity(LAYERS, {})
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other)
