"""What the calibration images show of a layer's input: its range and its mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable


@dataclass(frozen=True)
class Observation:
    """What the calibration images showed of a layer's input."""

    low: float
    high: float
    mean_patch: Tensor
    """mean input seen by each weight of an output channel, padding included; a filter's shape, groups stacked"""
    count: int
    """positions of the output that the mean is over"""

    def __add__(self, other: Observation) -> Observation:
        """What two calls of the layer showed."""
        count = self.count + other.count
        mean_patch = (self.mean_patch * self.count + other.mean_patch * other.count) / count
        return Observation(min(self.low, other.low), max(self.high, other.high), mean_patch, count)


def observe(layer: Quantizable, x: Tensor) -> Observation:
    """The range and mean patch of `x`, a layer's input on all calibration images."""
    low, high = (float(value) for value in torch.aminmax(x))
    if isinstance(layer, nn.Linear):
        return Observation(low, high, mean_patch(layer, x), x.numel() // layer.in_features)
    height, width = layer._conv_forward(x[:1], layer.weight, layer.bias).shape[-2:]
    return Observation(low, high, mean_patch(layer, x), len(x) * height * width)


def mean_patch(layer: Quantizable, x: Tensor) -> Tensor:
    """Mean input that each weight of an output channel sees, as in `Observation`."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).mean(0)
    (rows, cols), (down, right) = layer.kernel_size, layer.stride
    height, width = layer._conv_forward(x[:1], layer.weight, layer.bias).shape[-2:]
    whole = padded(layer, x)
    taps = [
        whole[:, :, row * layer.dilation[0] :: down, col * layer.dilation[1] :: right][..., :height, :width]
        for row in range(rows)
        for col in range(cols)
    ]
    means = torch.stack([tap.mean(dim=(0, 2, 3)) for tap in taps], dim=1)
    return means.view(-1, rows, cols)


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """An input with what the layer puts around it."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


@torch.no_grad()
def calibrate(prepared: Prepared, pixels: Tensor) -> list[Observation]:
    """What each layer's input is on the calibration images, in all calls of it, in the order of the layers.

    A layer that none of them reaches is observed on the images on which it was found. Raises
    `RuntimeError` where it is not reached by those either, as in a process without the network's globals.
    """
    seen: dict[int, Observation] = {}

    def watched(index: int, module: Quantizable) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            if index in missing:
                found = observe(module, x)
                seen[index] = seen[index] + found if index in seen else found
            return module(x)

        return call

    for whole in (pixels, *prepared.watched):
        if missing := set(range(len(prepared.layers))) - seen.keys():
            for part in whole.split(prepared.batch):
                prepared(part, [watched(index, module) for index, module in enumerate(prepared.modules)])
    if silent := [layer.name for layer in prepared.layers if layer.index not in seen]:
        raise RuntimeError(f"{', '.join(silent)} ran when the network was prepared, and not in this process")
    return [seen[index] for index in range(len(prepared.layers))]


def groups_of(layer: Quantizable) -> int:
    """Groups of channels that have inputs of their own."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1
