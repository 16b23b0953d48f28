"""What the calibration images show: the range and the mean of layers' inputs, and the ranges of operands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.ranges import Range, RangeRule, Take, by_rule

MOST = 8
"""bits of an activation"""
_EVERY = range(2, MOST + 1)


@dataclass(frozen=True)
class Observation:
    """What the calibration images showed of a layer's input."""

    low: float
    """of the range that 8 bits cover"""
    high: float
    mean_patch: Tensor
    """mean input seen by each weight of an output channel, padding included; a filter's shape, groups stacked"""
    count: int
    """positions of the output that the mean is over"""
    fewer: Mapping[int, Range] = field(default_factory=dict)
    """the range that fewer bits cover, by bits, where it is another"""

    def range_at(self, bits: int) -> Range:
        """What integers of `bits` cover."""
        return self.fewer.get(bits, (self.low, self.high))

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
def calibrate(prepared: Prepared, pixels: Tensor, rule: RangeRule = "minmax") -> list[Observation]:
    """What each layer's input is on the calibration images, in all calls of it, in the order of the layers.

    Its range is chosen by `rule`. A layer that none of them reaches is observed on the images on which it was found.
    Raises `RuntimeError` where it is not reached by those either, as in a process without the network's globals.
    """
    seen: dict[int, Observation] = {}
    sizes = Counter[int]()

    def take(index: int, x: Tensor) -> None:
        if index in missing:
            found = observe(prepared.modules[index], x)
            seen[index] = seen[index] + found if index in seen else found
            sizes[index] += x.numel()

    for whole in (pixels, *prepared.watched):
        if missing := set(range(len(prepared.layers))) - seen.keys():
            for part in whole.split(prepared.batch):
                _watch(prepared, part, take)
            if rule != "minmax" and (found := {index: sizes[index] for index in sorted(missing & seen.keys())}):
                run = _reading(prepared)
                for index, ranges in by_rule(rule, run, whole.split(1), found, _EVERY).items():
                    low, high = ranges[MOST]
                    fewer = {bits: each for bits, each in ranges.items() if each != (low, high)}
                    seen[index] = replace(seen[index], low=low, high=high, fewer=fewer)
    prepared.check_reached(seen)
    return [seen[index] for index in range(len(prepared.layers))]


@torch.no_grad()
def calibrate_operands(prepared: Prepared, pixels: Tensor, rule: RangeRule = "minmax") -> list[Range]:
    """The range of each operand of a network on the calibration images, for 8 bits."""
    count, first = len(prepared.operands), len(prepared.layers)
    ends: dict[int, Range] = {}
    sizes = Counter[int]()

    def take(index: int, x: Tensor) -> None:
        if index >= first:
            low, high = (float(end) for end in torch.aminmax(x))
            others = ends.get(index, (low, high))
            ends[index] = min(low, others[0]), max(high, others[1])
            sizes[index] += x.numel()

    for part in pixels.split(prepared.batch) if count else ():
        _watch(prepared, part, take)
    if rule != "minmax":
        ends = {
            index: ranges[MOST]
            for index, ranges in by_rule(rule, _reading(prepared), pixels.split(1), sizes, (MOST,)).items()
        }
    return [ends[first + place] for place in range(count)]


def _reading(prepared: Prepared) -> Callable[[Tensor, Take[int]], None]:
    return lambda image, take: _watch(prepared, image, take)


def _watch(prepared: Prepared, pixels: Tensor, take: Take[int]) -> None:
    """Runs a network that tells of the input of each layer, by its index, and of operands, by theirs after these."""

    def watched(index: int, module: Quantizable) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            take(index, x)
            return module(x)

        return call

    def operand(place: int, x: Tensor) -> Tensor:
        take(len(prepared.layers) + place, x)
        return x

    layers = [watched(index, module) for index, module in enumerate(prepared.modules)]
    prepared(pixels, layers, operand if prepared.operands else None)


def groups_of(layer: Quantizable) -> int:
    """Groups of channels that have inputs of their own."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1
