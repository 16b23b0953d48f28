"""What the calibration images show of a layer's input: its range, its mean and its second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.device import widest
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.rounding import Moments

HELD_OUT = 4
"""one calibration image in so many judges what was fitted to the others"""
_PATCHES = 2**23
"""bytes of a layer's unfolded input that are held at once, about"""
_STRIP = 512
"""inputs whose products with those behind them are added together"""


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
        return Observation(low, high, x.flatten(0, -2).mean(0), x.numel() // layer.in_features)
    (rows, cols), (down, right) = layer.kernel_size, layer.stride
    height, width = layer._conv_forward(x[:1], layer.weight, layer.bias).shape[-2:]
    padded = F.pad(x, layer._reversed_padding_repeated_twice)
    taps = [
        padded[:, :, row * layer.dilation[0] :: down, col * layer.dilation[1] :: right][..., :height, :width]
        for row in range(rows)
        for col in range(cols)
    ]
    means = torch.stack([tap.mean(dim=(0, 2, 3)) for tap in taps], dim=1)
    return Observation(low, high, means.view(-1, rows, cols), len(x) * height * width)


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


def block_of(layer: Quantizable, memory: int) -> int:
    """Inputs a block of a layer's moments, as many as take `memory` bytes in float32, or all of them."""
    inputs, groups = layer.weight[0].numel(), groups_of(layer)
    blocks = -(-4 * groups * inputs**2 // memory)
    return -(-inputs // blocks)


def together(layers: Sequence[Quantizable], blocks: Mapping[int, int], memory: int) -> Iterator[list[int]]:
    """Those of `layers` whose second moments fit into `memory` bytes together, of a fit and of what is left out.

    `blocks` are the inputs a block, of each index that is wanted.
    """
    group: list[int] = []
    taken = 0
    for index, block in blocks.items():
        size = 8 * groups_of(layers[index]) * -(-layers[index].weight[0].numel() // block) * block**2
        if group and taken + size > memory:
            yield group
            group, taken = [], 0
        group.append(index)
        taken += size
    if group:
        yield group


def groups_of(layer: Quantizable) -> int:
    """Groups of channels that have inputs of their own."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def patches(layer: Quantizable, x: Tensor) -> Iterator[Tensor]:
    """The unfolded input in parts, each (G, I, ..., positions), `I` being the inputs of a filter."""
    inputs = layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        for rows in x.flatten(0, -2).split(max(_PATCHES // (4 * inputs), 1)):
            yield rows.T[None]
        return
    positions = layer._conv_forward(x[:1], layer.weight, None)[0, 0].numel()
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=_padding(layer))
    for images in padded.split(max(_PATCHES // (4 * layer.groups * inputs * positions), 1)):
        if layer.kernel_size == (1, 1):
            down, right = layer.stride
            found = images[:, :, ::down, ::right].flatten(2)
        else:
            found = F.unfold(images, layer.kernel_size, layer.dilation, 0, layer.stride)
        yield found.view(len(images), layer.groups, inputs, -1).permute(1, 2, 0, 3)


def _padding(layer: nn.Conv2d) -> str:
    return "constant" if layer.padding_mode == "zeros" else layer.padding_mode


@torch.no_grad()
def second_moments(
    prepared: Prepared, pixels: Tensor, seen: Sequence[Observation], blocks: Mapping[int, int]
) -> dict[int, Moments]:
    """Those of the inputs of some layers on `pixels` (N, C, H, W), given by index with the inputs of a block."""
    sums = {
        index: Sums(prepared.modules[index], seen[index].mean_patch, block, compared=False)
        for index, block in blocks.items()
    }

    def watched(index: int, module: Quantizable) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            if index in sums:
                sums[index].take(x)
            return module(x)

        return call

    for part in pixels.split(prepared.batch):
        prepared(part, [watched(index, module) for index, module in enumerate(prepared.modules)])
    return {index: each.moments() for index, each in sums.items() if each.count}


class Sums:
    """Adds up a layer's unfolded input and its products, and where two inputs are `compared` what their difference is
    worth at the output.

    Everything is taken from about the mean of the calibration images, so that little is lost
    to rounding where means are large.
    """

    def __init__(self, layer: Quantizable, mean_patch: Tensor, block: int, compared: bool) -> None:
        self.layer = layer
        self.count = 0
        groups, inputs = groups_of(layer), layer.weight[0].numel()
        self._blocks, self._block = -(-inputs // block), block
        self._shape, self._middle = mean_patch.shape, mean_patch.reshape(groups, inputs, 1)
        parts, outputs, device = groups * self._blocks, len(layer.weight) // groups, mean_patch.device
        self._products = torch.zeros(parts, block, block, device=device)
        self._lost = torch.zeros(parts, outputs, block, device=device) if compared else None
        wide = widest(device)
        self._total = torch.zeros_like(self._middle, dtype=wide)
        self._apart = torch.zeros(groups, outputs, 1, dtype=wide, device=device)

    def take(self, x: Tensor, other: Tensor | None = None) -> None:
        """Adds the input `x` of one call, and `other`, which it is compared with."""
        apart, begun = None if other is None else self._outputs(other - x), 0
        for part in patches(self.layer, x):
            centred = self._centred(part)
            self._total += centred.sum(2, keepdim=True)
            mine = self._cut(centred)
            for start in range(0, self._block, _STRIP):  # no product twice
                rows = mine[:, start : start + _STRIP]
                self._products[:, start : start + _STRIP, start:].baddbmm_(rows, mine[:, start:].transpose(1, 2))
            if apart is not None:
                assert self._lost is not None
                off = apart[:, :, begun : begun + centred.shape[2]]
                self._apart += off.sum(2, keepdim=True)
                self._lost.baddbmm_(self._repeated(off), mine.transpose(1, 2))
            begun += centred.shape[2]
        self.count += begun

    def _outputs(self, x: Tensor) -> Tensor:
        """What the layer makes of an input, (G, O / G, positions) without bias."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return (layer.weight @ x.flatten(0, -2).T)[None]
        return layer._conv_forward(x, layer.weight, None).transpose(0, 1).reshape(*self._apart.shape[:2], -1)

    def _centred(self, part: Tensor) -> Tensor:
        """Of `patches` (G, I, positions), about the mean of the calibration images."""
        middle = self._middle.view(*self._middle.shape[:2], *[1] * (part.dim() - 2))
        return torch.sub(part, middle, out=torch.empty(part.shape, device=part.device)).flatten(2)

    def _cut(self, part: Tensor) -> Tensor:
        if self._blocks == 1:
            return part
        filled = F.pad(part, (0, 0, 0, self._blocks * self._block - part.shape[1]))
        return filled.reshape(-1, self._block, part.shape[2])

    @property
    def mean(self) -> Tensor:
        """Of the input, in the shape of `Observation.mean_patch`."""
        return (self._middle + (self._total / self.count).float()).reshape(self._shape)

    @property
    def mean_apart(self) -> Tensor:
        """Of what the difference to what it is compared with gives at the output, (O,)."""
        return (self._apart / self.count).float().flatten()

    def moments(self) -> Moments:
        """Of the input about its mean."""
        mine = self._cut((self._total / self.count).float())
        matrix = (self._products / self.count).sub_(mine @ mine.transpose(1, 2))
        for start in range(_STRIP, self._block, _STRIP):
            rows = slice(start, start + _STRIP)
            matrix[:, rows, :start] = matrix[:, :start, rows].transpose(1, 2)
        mean = self._cut(self._middle + (self._total / self.count).float())
        return Moments(
            matrix.view(-1, self._blocks, self._block, self._block),
            mean.view(-1, self._blocks, self._block),
            self.count,
        )

    def lost(self) -> Tensor:
        """Second moments (G, K, O / G, B) of what the difference to what it is compared with gives at the output, and
        the input, each about its mean."""
        assert self._lost is not None
        mine = self._cut((self._total / self.count).float())
        off = self._repeated((self._apart / self.count).float())
        return (self._lost / self.count - off @ mine.transpose(1, 2)).view(-1, self._blocks, *self._lost.shape[1:])

    def _repeated(self, outputs: Tensor) -> Tensor:
        """Of each group, for each of its blocks."""
        return outputs if self._blocks == 1 else outputs.repeat_interleave(self._blocks, 0)
