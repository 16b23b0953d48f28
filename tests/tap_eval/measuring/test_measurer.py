"""A network runs in integers where these give what the simulated path gives, and the user is told where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.allocation.choices import uniform
from tap_eval.images.images import AS_THEY_ARE, Images, Splits
from tap_eval.kept import Kept
from tap_eval.measuring.job import Job
from tap_eval.measuring.measurer import Measurer
from tap_eval.measuring.recipe import Bounds, Recipe
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization import integer
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.quantizer import QuantizedNetwork
from tests.tap_eval.quantization.processor import SCALES_AS_SIMULATED

MOST = 8 if integer.exact() else 7
"""bits of weights that this CPU multiplies exactly by bytes"""


class Deep(nn.Module):
    """Layers with GELU between, whose last bits depend on how tensors lie in memory, and outputs that magnify them."""

    def __init__(self, view: bool = False) -> None:
        super().__init__()
        self.view = view
        self.layers = nn.ModuleList(nn.Conv2d(3 if index == 0 else 16, 16, 3, padding=1) for index in range(12))
        self.last = nn.Linear(16 * 64, 10)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return torch.sin(30 * self.last(x.view(len(x), -1) if self.view else x.flatten(1)))


class Scaled(nn.Module):
    """Between its layers it divides by what `scale` computes."""

    def __init__(self, scale: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.scale, self.first, self.last = scale, nn.Linear(192, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(1))
        return self.last(y / self.scale(y))


NOISE = Images(
    np.random.default_rng(0).integers(0, 256, (200, 3, 8, 8), np.uint8),
    torch.zeros(200, dtype=torch.int64),
    AS_THEY_ARE,
)


def measurer(network: nn.Module, images: Images = NOISE) -> Measurer:
    prepared = prepare(network.eval(), images.pixels[:16])
    splits = Splits("noise", tuple("0123456789"), (images.only(np.arange(16)),), images, images)
    recipe = Recipe("nearest", (MOST,), "noise", Kept(None))
    return Measurer(prepared, splits, uniform(prepared.layers, MOST), Bounds(batch=16), recipe)


@SCALES_AS_SIMULATED
def test_roundings_that_fall_otherwise_are_no_fault_and_both_paths_have_one_layout() -> None:
    torch.manual_seed(0)
    network = Deep()
    prepared = measurer(network).prepared
    contiguous = QuantizedNetwork(prepared, calibrate(prepared, NOISE.pixels[:16]))
    contiguous.choose(uniform(prepared.layers, MOST))
    labels = contiguous.logits(NOISE.pixels, 16).argmax(1)
    measured = measurer(network, replace(NOISE, labels=labels))
    assert measured.unfit is None
    job = Job(uniform(prepared.layers, MOST), "search", 0, np.arange(200), integers=True)
    fast, simulated = (measured.logits(replace(job, integers=integers)).argmax(1) for integers in (True, False))
    assert (fast != simulated).sum() < (fast != labels).sum()


def test_a_network_that_takes_one_layout_for_granted_is_measured_in_it() -> None:
    torch.manual_seed(0)
    measured = measurer(Deep(view=True))
    assert len(measured.logits(Job(None, "search", 0, np.arange(20), integers=False))) == 20
    assert measured.unfit is None


class Swish(torch.autograd.Function):
    """Keeps its input alone for training, as EfficientNets have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)


def test_functions_with_a_gradient_of_their_own_are_recorded() -> None:
    class Efficient(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(Swish.apply(self.first(x.flatten(1))).add_(1))

    torch.manual_seed(0)
    assert measurer(Efficient(abs)).unfit is None


def test_a_table_that_is_computed_in_place_is_a_constant() -> None:
    class Biased(Scaled):
        def __init__(self) -> None:
            super().__init__(abs)
            self.table, self.wide = nn.Buffer(torch.rand(16, 2)), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            table = torch.relu_(self.wide(self.table)).squeeze(1)
            table[:8] += 1
            return self.last(self.first(x.flatten(1)) + table)

    torch.manual_seed(0)
    assert measurer(Biased()).unfit is None


def test_steps_that_return_nothing_beside_their_tensors_are_compared() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.cube, self.last = nn.LSTM(24, 8, batch_first=True), nn.Conv3d(1, 2, 3), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            rows, _ = self.rows(x.transpose(1, 2).flatten(2))
            return self.last(rows.mean(1) + self.cube(x[:, None]).mean())

    torch.manual_seed(0)
    assert measurer(Recurrent()).unfit is None


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (lambda y: np.abs(y.detach().numpy()).max(), "something else than the network, first in the input of last"),
        (lambda y: y[y > 0].reshape(len(y[y > 0])).mean(), "cannot be recorded"),
        (lambda y: 2 if y.mean() > 0 else 3, "cannot be recorded"),
    ],
    ids=["in numpy", "of a size that images decide", "a branch that images decide"],
)
def test_a_network_whose_steps_depend_on_the_images_is_measured_as_it_is(
    scale: Callable[[Tensor], Any], said: str
) -> None:
    torch.manual_seed(0)
    measured = measurer(Scaled(scale))
    assert said in str(measured.unfit)
    assert len(measured.layer_errors(2, 16)) == 2
