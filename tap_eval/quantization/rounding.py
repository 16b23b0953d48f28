"""Integers and scales of a layer's weights: the nearest, or those whose products differ least on calibration images.

Weights are symmetric integers within +-(2^(bits-1) - 1), with a scale an output channel. Rows do
not interact: all bit counts of a layer are rounded side by side, as so many more rows. Of a
layer with groups each group has inputs, and so second moments, of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Rounding = Literal["gptq", "nearest"]
DAMPINGS = (0.02, 0.1, 0.5, 2.0)
"""of the mean diagonal, added to the moments before they are inverted: the more, the fewer images they are from"""
_AT_ONCE = 2**16
"""weights that are rounded to the nearest together: as many as stay in a core's cache"""
_COLUMNS = 64
"""that are rounded one after the other before what they are off goes to all columns behind them"""
_ALTERNATIONS = 3
"""of rounding with the scale that is best for what was rounded"""
_COARSE, _FINE = torch.linspace(0.3, 1.1, 9).tolist(), torch.linspace(-0.075, 0.075, 7).tolist()
"""scales that are tried, in parts of that which reaches the greatest weight, and around the best of them"""


@dataclass(frozen=True)
class Rounded:
    """`integers` (O, ...) int8 and `scale` (O,) float32, for weights near `integers * scale`."""

    integers: Tensor
    scale: Tensor

    def real(self) -> Tensor:
        """The weight that the integers stand for, float32."""
        return self.integers * self.scale.view(-1, *[1] * (self.integers.dim() - 1))


def nearest(weight: Tensor, bits: int) -> Rounded:
    """Rounded to the nearest level, with the scale of least squared error; `weight` is (O, ...)."""
    top = 2.0 ** (bits - 1) - 1
    parts = [_nearest(part.flatten(1), top) for part in weight.split(max(_AT_ONCE // weight[0].numel(), 1))]
    integers, scale = (torch.cat(each) for each in zip(*parts, strict=True))
    return Rounded(integers.view_as(weight), scale)


def _nearest(flat: Tensor, top: float) -> tuple[Tensor, Tensor]:
    rows, tops = flat[None, None], torch.full((1, len(flat)), top, device=flat.device)
    scale = _scales(rows, lambda whole: whole, tops)
    for _ in range(_ALTERNATIONS):
        whole = (flat / scale.T).round_().clamp_(-top, top)
        square = whole.square().sum(1)
        scale = torch.where(square > 0, (whole * flat).sum(1) / square.clamp_min(1), scale)
    whole = (flat / scale.T).round_().clamp_(-top, top)
    return whole.to(torch.int8), scale[0].float()


def error(weight: Tensor, rounded: Rounded, moments: Tensor) -> float:
    """Mean squared difference of outputs, summed over channels, on inputs with `moments` (G, K, B, B)."""
    off = grouped(rounded.real() - weight, moments)
    return float(((off @ moments) * off).sum(dtype=torch.float64))


def gptq(weight: Tensor, fit: Tensor, held: Tensor | None, share: float, bits: Sequence[int]) -> list[Rounded | None]:
    """Rounded column by column, each time making up for it in the columns behind (GPTQ, Frantar et al. 2023).

    `weight` is (O, ...); `fit` (G, K, B, B) are the moments of the inputs of its G groups, each
    cut into K blocks of B inputs that are taken for uncorrelated, the last filled up with
    zeros; `held` are those of images left out, a `share` of all. With them the damping is
    chosen, and where GPTQ is worse than the nearest there, there is None in its place. All
    images count in the end. One result for each of `bits`.
    """
    whole = fit if held is None else fit * (1 - share) + held * share
    rows = grouped(weight, fit)
    scales = [_scales(rows, lambda part: part @ whole, _tops(rows, each)) for each in bits]

    def at(moments: Tensor, damping: float, places: Sequence[int]) -> list[Rounded]:
        inverse = Inverse.of(moments, damping)
        scale, tops = torch.cat([scales[place] for place in places], 1), [_tops(rows, bits[place]) for place in places]
        integers = inverse.integers(rows.repeat(1, 1, len(places), 1), scale, torch.cat(tops, 1))
        parts = integers.split(rows.shape[2], 2)
        return [_ungrouped(part, scales[place], weight) for part, place in zip(parts, places, strict=True)]

    every = range(len(bits))
    if held is None:
        return list(at(fit, DAMPINGS[1], every))
    lowest = min(every, key=lambda place: bits[place])
    tried = {damping: error(weight, at(fit, damping, [lowest])[0], held) for damping in DAMPINGS}
    damping = min(DAMPINGS, key=lambda each: tried[each])
    lost = [
        error(weight, trial, held) > error(weight, nearest(weight, each), held)
        for trial, each in zip(at(fit, damping, every), bits, strict=True)
    ]
    return [None if fell else found for found, fell in zip(at(whole, damping, every), lost, strict=True)]


def _tops(rows: Tensor, bits: int) -> Tensor:
    return torch.full((len(rows), rows.shape[2]), 2.0 ** (bits - 1) - 1, device=rows.device)


def grouped(weight: Tensor, moments: Tensor) -> Tensor:
    """(O, ...) as (G, K, O / G, B), filled up with zeros."""
    groups, blocks, size, _ = moments.shape
    flat = weight.reshape(groups, len(weight) // groups, -1)
    flat = F.pad(flat, (0, blocks * size - flat.shape[2]))
    return flat.view(groups, -1, blocks, size).transpose(1, 2)


def _ungrouped(rows: Tensor, scale: Tensor, weight: Tensor) -> Rounded:
    """Integers as `grouped` gives rows, in the shape of `weight`, with their scales (G, R)."""
    flat = rows.transpose(1, 2).flatten(2)
    integers = flat[..., : weight[0].numel()].reshape(weight.shape)
    return Rounded(integers.to(torch.int8), scale.flatten().float())


def by_gptq(rows: Tensor, moments: Tensor, tops: Tensor, damping: float, weight: Tensor) -> Rounded:
    """By GPTQ, for rows (G, K, R, B) in the place of `weight`, with `tops` (G, R) the greatest integers."""
    scale = _scales(rows, lambda part: part @ moments, tops)
    return _ungrouped(Inverse.of(moments, damping).integers(rows, scale, tops), scale, weight)


@dataclass(frozen=True)
class Inverse:
    """The upper Cholesky factor (G, K, B, B) of the inverse of damped moments, inputs by falling diagonal."""

    factor: Tensor
    order: Tensor
    """(G, K, B)"""

    @staticmethod
    def of(moments: Tensor, damping: float) -> Inverse:
        """With H turned round, H = R R' for an upper triangular R, and R^-1 is the factor."""
        order = moments.diagonal(dim1=2, dim2=3).argsort(2, descending=True)
        turned = order.flip(2)
        wide = moments.double()
        wide = wide.gather(2, turned.unsqueeze(3).expand_as(wide)).gather(3, turned.unsqueeze(2).expand_as(wide))
        upper = torch.linalg.cholesky(damped(wide, damping)).flip(2, 3)
        identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device).expand_as(wide)
        return Inverse(torch.linalg.solve_triangular(upper, identity, upper=True).to(moments.dtype), order)

    def integers(self, rows: Tensor, scale: Tensor, tops: Tensor) -> Tensor:
        """Of rows (G, K, R, B) with scales and greatest integers (G, R)."""
        order = self.order.unsqueeze(2).expand_as(rows)
        columns = rows.gather(3, order).transpose(2, 3).contiguous()
        found = torch.empty_like(columns)
        size, each, limit = columns.shape[2], scale.unsqueeze(1), tops.unsqueeze(1)
        for start in range(0, size, _COLUMNS):
            stop = min(start + _COLUMNS, size)
            off = torch.empty_like(columns[:, :, start:stop])
            for place in range(start, stop):
                column = columns[:, :, place]
                whole = (column / each).round_().clamp_(-limit, limit)
                found[:, :, place] = whole
                error = (column - whole * each) / self.factor[:, :, place, place, None]
                off[:, :, place - start] = error
                columns[:, :, place + 1 : stop] -= self.factor[:, :, place, place + 1 : stop, None] * error.unsqueeze(2)
            columns[:, :, stop:] -= self.factor[:, :, start:stop, stop:].transpose(2, 3) @ off
        return torch.empty_like(rows).scatter_(3, order, found.transpose(2, 3))


def damped(moments: Tensor, damping: float) -> Tensor:
    """With `damping` times the mean diagonal on the diagonal, in place."""
    diagonal = moments.diagonal(dim1=2, dim2=3)
    diagonal += (damping * diagonal.mean(2, keepdim=True)).clamp_min(1e-12)
    return moments


def _scales(rows: Tensor, multiplied: Callable[[Tensor], Tensor], tops: Tensor) -> Tensor:
    """The scales (G, R) at which rounding to the nearest is least off by the moments `H`, as `multiplied` by which.

    Each scale of a grid gives integers `q`, for which `q H w / q H q` is the best scale; its
    error is `w H w - (q H w)^2 / q H q`.
    """
    peak = rows.abs().amax((1, 3)).clamp_min(1e-12)
    limit = tops[:, None, :, None].to(rows.dtype)
    best_gain = torch.full_like(peak, -torch.inf)
    best_scale, best_shrink = peak / tops, torch.ones_like(peak)

    def attempt(shrink: Tensor) -> None:
        nonlocal best_gain, best_scale, best_shrink
        step = peak * shrink / tops
        whole = (rows / step[:, None, :, None]).round_().clamp_(-limit, limit)
        product = multiplied(whole)
        square, cross = (product * whole).sum((1, 3)), (product * rows).sum((1, 3))
        scale = torch.where((square > 0) & (cross > 0), cross / square.clamp_min(1e-30), step)
        gain = 2 * scale * cross - scale.square() * square
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale, best_shrink = torch.where(better, scale, best_scale), torch.where(better, shrink, best_shrink)

    for coarse in _COARSE:
        attempt(torch.full_like(peak, coarse))
    middle = best_shrink
    for fine in _FINE:
        attempt(middle + fine)
    return best_scale
