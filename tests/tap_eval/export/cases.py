"""Networks whose files are tried: quantized, with images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.networks.resnet import CifarResNet
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork
from tests.tap_eval.preparing.networks import randomized
from tests.tap_eval.quantization.test_integer import Odd, vit

IMAGES = 24


class Straight(nn.Module):
    """Convolutions of every kind whose outputs layers alone read, but for the last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.deep, self.group = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1, groups=2)
        self.wide, self.last = nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)
        nn.init.normal_(self.deep.weight, std=3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(F.pad(x, (0, 1, 0, 1)))), inplace=True)
        x = F.relu6(self.deep(F.pad(x, (1, 1, 1, 1))))
        x = F.max_pool2d(F.relu(self.group(x)), 2)
        x = F.leaky_relu(self.last(F.relu(self.wide(x))))
        return self.head(x.mean((2, 3)))


class Perceptron(nn.Module):
    """Linear layers on rows, one after the other, and one that is called again on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(192, 24), nn.Linear(24, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.flatten(1)))
        tokens = self.second(F.gelu(x).unflatten(0, (-1, 1)).expand(-1, 3, -1) * torch.arange(1.0, 4).view(1, 3, 1))
        return self.third(F.relu(self.second(x)) + tokens.mean(1))


class Case(NamedTuple):
    """A quantized network, with images."""

    prepared: Prepared
    network: QuantizedNetwork
    pixels: Tensor

    def at(self, allocation: Allocation) -> QuantizedNetwork:
        self.network.choose(allocation)
        return self.network

    def mixed(self, *bits: int, activations: int = 8) -> Allocation:
        """Every output channel with the next of `bits`."""
        layers = self.prepared.layers
        each = tuple(tuple(bits[row % len(bits)] for row in range(layer.out_channels)) for layer in layers)
        return Allocation(each, (activations,) * len(layers))


def case(network: nn.Module, size: int = 16) -> Case:
    pixels = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    prepared = prepare(randomized(network), pixels[:2])
    return Case(prepared, QuantizedNetwork(prepared, calibrate(prepared, pixels[:16])), pixels)


NETWORKS: dict[str, Callable[[], Case]] = {
    "straight": lambda: case(Straight()),
    "perceptron": lambda: case(Perceptron(), 8),
    "odd": lambda: case(Odd()),
    "resnet20": lambda: case(CifarResNet(20), 32),
    "vit": lambda: case(vit(), 32),
}


class Between(nn.Module):
    """A layer, something else, and a layer."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.step, self.head = nn.Conv2d(3, 8, 3), step, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self.layer(x)).mean((2, 3)))


def asks(x: Tensor) -> Tensor:
    return 2 * x if len(x) > 2 else x


def looks(x: Tensor) -> Tensor:
    return 2 * x if x.sum() > 0 else x
