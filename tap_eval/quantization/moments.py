"""Second moments of a layer's unfolded input: what its outputs are off where its weights are off.

Where positions are few beside inputs, their products are never added up: what is asked of the
moments is computed from the inputs at the positions. Where they are many, some are enough,
since what neighbours see is nearly the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.device import widest
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.calibration import Observation, groups_of, padded

HELD_OUT = 4
"""one calibration image in so many judges what was fitted to the others"""
_PATCHES = 2**23
"""bytes of a layer's unfolded input that are held at once, about"""
_STRIP = 512
"""inputs whose products with those behind them are added together"""
_FEW = 2
"""inputs a position from which on positions count as few"""
_ENOUGH, _LEAST = 8, 4096
"""positions an input, and at all, that are enough"""


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's unfolded input about its mean, (G, K, B, B), the mean over `count` positions.

    Each of G groups has its inputs in K blocks of B, the last filled up with zeros; what
    different blocks have in common is not kept. `mean` is (G, K, B).
    """

    matrix: Tensor
    mean: Tensor
    count: int

    def __add__(self, other: Moments) -> Moments:
        """Those of both, about the mean of each."""
        count = self.count + other.count
        matrix, mean = (
            (mine * self.count + theirs * other.count).div_(count)
            for mine, theirs in ((self.matrix, other.matrix), (self.mean, other.mean))
        )
        return Moments(matrix, mean, count)

    def around_zero(self) -> Tensor:
        """Second moments about zero, (G, K, B, B)."""
        return self.matrix + self.mean.unsqueeze(3) * self.mean.unsqueeze(2)

    @property
    def diagonal(self) -> Tensor:
        """(G, K, B)."""
        return self.matrix.diagonal(dim1=2, dim2=3)

    @property
    def held(self) -> int:
        """Numbers that are in memory for it."""
        return self.matrix.numel()

    def cost(self, rows: Tensor) -> Tensor:
        """What rows (G, K, R, B) give at the output, squared: (G, K, R, B), to be summed over the last."""
        return (rows @ self.matrix) * rows

    def near(self, size: int) -> Tensor:
        """Those of inputs in parts of `size`, (G, K, parts, size, size), the last filled up with zeros."""
        groups, blocks, inputs, _ = self.matrix.shape
        parts = -(-inputs // size)
        filled = F.pad(self.matrix, (0, parts * size - inputs) * 2).view(groups, blocks, parts, size, parts, size)
        return filled.diagonal(dim1=2, dim2=4).movedim(-1, 2)


@dataclass(frozen=True)
class Few:
    """The same of few positions: `inputs` (G, K, B, N) at each about their mean, divided by the root of `count`."""

    inputs: Tensor
    mean: Tensor
    count: int

    def __add__(self, other: Few) -> Few:
        """See `Moments.__add__`."""
        count = self.count + other.count
        shares = [(each, each.count / count) for each in (self, other)]
        inputs = torch.cat([each.inputs * math.sqrt(share) for each, share in shares], 3)
        return Few(inputs, sum((each.mean * share for each, share in shares), torch.zeros_like(self.mean)), count)

    @property
    def diagonal(self) -> Tensor:
        """See `Moments.diagonal`."""
        return self.inputs.square().sum(3)

    @property
    def held(self) -> int:
        """See `Moments.held`."""
        return self.inputs.numel()

    def cost(self, rows: Tensor) -> Tensor:
        """What rows (G, K, R, B) give at the output, squared: (G, K, R, N), to be summed over the last."""
        return (rows @ self.inputs).square_()

    def near(self, size: int) -> Tensor:
        """See `Moments.near`."""
        groups, blocks, count, positions = self.inputs.shape
        parts = -(-count // size)
        filled = F.pad(self.inputs, (0, 0, 0, parts * size - count)).view(groups, blocks, parts, size, positions)
        return filled @ filled.mT


def side_by_side(several: Sequence[Moments | Few]) -> Moments | Few:
    """Those of several layers of one shape, one after the other along the groups."""
    first, *others = several
    if not others:
        return first
    mean = torch.cat([each.mean for each in several])
    if isinstance(first, Few):
        return Few(torch.cat([each.inputs for each in several if isinstance(each, Few)]), mean, first.count)
    return Moments(torch.cat([each.matrix for each in several if isinstance(each, Moments)]), mean, first.count)


def block_of(layer: Quantizable, memory: int, positions: int = 0) -> int:
    """Inputs a block of a layer's moments, as many as take `memory` bytes in float32, or all of them.

    So it is of few `positions`, where these are told and the inputs at them take no more than that.
    """
    inputs, groups = layer.weight[0].numel(), groups_of(layer)
    if 0 < positions * _FEW <= inputs and 4 * groups * inputs * positions <= memory:
        return inputs
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


@torch.no_grad()
def second_moments(
    prepared: Prepared, pixels: Tensor, seen: Sequence[Observation], blocks: Mapping[int, int]
) -> dict[int, Moments | Few]:
    """Those of the inputs of some layers on `pixels` (N, C, H, W), given by index with the inputs of a block."""
    sums = {index: Sums(prepared.modules[index], block, seen[index].count) for index, block in blocks.items()}

    def watched(index: int, module: Quantizable, x: Tensor) -> Tensor:
        if index in sums:
            sums[index].take(x)
        return module(x)

    for part in pixels.split(prepared.batch):
        prepared(part, [partial(watched, index, module) for index, module in enumerate(prepared.modules)])
    return {index: each.moments() for index, each in sums.items() if each.count}


class Sums:
    """Adds up a layer's unfolded input and its products, and where outputs that are wanted are `compared`, what is
    missing of them.

    Everything is taken about the mean of what comes first, so that float32 loses little of inputs whose mean is
    large, and nothing of those that are always the same.
    """

    def __init__(self, layer: Quantizable, block: int, positions: int = 0, compared: bool = False) -> None:
        """`positions` are those that are to come, 0 to take all as they are."""
        self.layer = layer
        self.count = 0
        groups, inputs = groups_of(layer), layer.weight[0].numel()
        self._blocks, self._block = -(-inputs // block), block
        self._middle: Tensor | None = None
        self._every = max(positions // max(_ENOUGH * block, _LEAST), 1)
        self._few = 0 < positions * _FEW <= block
        parts, outputs, device = groups * self._blocks, len(layer.weight) // groups, layer.weight.device
        self._inputs: list[Tensor] = []
        self._missing: list[Tensor] = []
        self._products = torch.zeros(0 if self._few else parts, block, block, device=device)
        self._lost = torch.zeros(parts, outputs, block, device=device) if compared and not self._few else None
        self._compared = compared
        self._weight = layer.weight.reshape(groups, outputs, inputs)
        wide = widest(device)
        self._total = torch.zeros(groups, inputs, 1, dtype=wide, device=device)
        self._apart = torch.zeros(groups, outputs, 1, dtype=wide, device=device)

    def take(self, x: Tensor, wanted: Tensor | None = None) -> None:
        """Adds the input `x` of one call, and `wanted`, the outputs that it was to give."""
        for part, its in _patches(self.layer, x, wanted, self._every):
            centred = self._centred(part)
            self._total += centred.sum(2, keepdim=True)
            mine = self._cut(centred)
            if self._few:
                self._inputs.append(mine)
            else:
                for start in range(0, self._block, _STRIP):  # no product twice
                    rows = mine[:, start : start + _STRIP]
                    self._products[:, start : start + _STRIP, start:].baddbmm_(rows, mine[:, start:].transpose(1, 2))
            if its is not None:
                missing = its - self._weight @ centred
                self._apart += missing.sum(2, keepdim=True)
                if self._lost is None:
                    self._missing.append(missing)
                else:
                    self._lost.baddbmm_(self._repeated(missing), mine.transpose(1, 2))
            self.count += centred.shape[2]

    def _centred(self, part: Tensor) -> Tensor:
        """Of patches (G, I, ..., positions), about the mean of the first of them."""
        if self._middle is None:
            self._middle = part.flatten(2).mean(2, keepdim=True)
        middle = self._middle.view(*self._middle.shape[:2], *[1] * (part.dim() - 2))
        return torch.sub(part, middle, out=torch.empty(part.shape, device=part.device)).flatten(2)

    def _cut(self, part: Tensor) -> Tensor:
        if self._blocks == 1:
            return part
        filled = F.pad(part, (0, 0, 0, self._blocks * self._block - part.shape[1]))
        return filled.reshape(-1, self._block, part.shape[2])

    def moments(self) -> Moments | Few:
        """Of the input about its mean."""
        assert self._middle is not None
        mine = self._cut((self._total / self.count).float())
        mean = self._cut(self._middle + (self._total / self.count).float()).view(-1, self._blocks, self._block)
        if self._few:
            inputs = torch.cat(self._inputs, 2).sub_(mine).mul_(self.count**-0.5)
            return Few(inputs.view(-1, self._blocks, *inputs.shape[1:]), mean, self.count)
        matrix = (self._products / self.count).sub_(mine @ mine.transpose(1, 2))
        for start in range(_STRIP, self._block, _STRIP):
            rows = slice(start, start + _STRIP)
            matrix[:, rows, :start] = matrix[:, :start, rows].transpose(1, 2)
        return Moments(matrix.view(-1, self._blocks, self._block, self._block), mean, self.count)

    def lost(self) -> Tensor:
        """Second moments (G, K, O / G, B) of what is missing of the outputs and the input, each about its mean; of few
        positions what is missing at each (G, K, O / G, N), about its mean, divided by the root of their count."""
        assert self._compared
        off = self._repeated((self._apart / self.count).float())
        if self._lost is None:
            missing = self._repeated(torch.cat(self._missing, 2)).sub(off).mul_(self.count**-0.5)
            return missing.view(-1, self._blocks, *missing.shape[1:])
        mine = self._cut((self._total / self.count).float())
        return (self._lost / self.count - off @ mine.transpose(1, 2)).view(-1, self._blocks, *self._lost.shape[1:])

    def _repeated(self, outputs: Tensor) -> Tensor:
        """Of each group, for each of its blocks."""
        return outputs if self._blocks == 1 else outputs.repeat_interleave(self._blocks, 0)


def _patches(
    layer: Quantizable, x: Tensor, outputs: Tensor | None, every: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The unfolded input in parts, each (G, I, ..., positions), `I` being the inputs of a filter, of one position in
    `every`; and the outputs (G, O / G, positions) there.

    Of a convolution's positions each image gives others, so that borders and what is between them count as before.
    """
    inputs, groups = layer.weight[0].numel(), groups_of(layer)
    if isinstance(layer, nn.Linear):
        size = max(_PATCHES // (4 * inputs), 1)
        rows = x.flatten(0, -2)[::every].split(size)
        its = [None] * len(rows) if outputs is None else outputs.flatten(0, -2)[::every].split(size)
        for part, there in zip(rows, its, strict=True):
            yield part.T[None], there if there is None else there.T[None]
        return
    height, width = layer._conv_forward(x[:1], layer.weight, None).shape[2:]
    down = min(math.isqrt(every), height)
    right = min(every // down, width)
    whole, (rows_apart, cols_apart) = padded(layer, x), layer.stride
    for phase in range(min(down * right, len(x))):
        row, col = divmod(phase, right)
        images = whole[phase :: down * right, :, row * rows_apart :, col * cols_apart :]
        size = max(_PATCHES * down * right // (4 * groups * inputs * height * width), 1)
        for start in range(0, len(images), size):
            part = images[start : start + size]
            strides = (down * rows_apart, right * cols_apart)
            if layer.kernel_size == (1, 1):
                found = part[:, :, :: strides[0], :: strides[1]].flatten(2)
            else:
                found = F.unfold(part, layer.kernel_size, layer.dilation, 0, strides)
            found = found.view(len(part), groups, inputs, -1).permute(1, 2, 0, 3)
            if outputs is None:
                yield found, None
                continue
            there = outputs[phase :: down * right, :, row::down, col::right][start : start + size]
            yield found, there.transpose(0, 1).reshape(groups, len(layer.weight) // groups, -1)
