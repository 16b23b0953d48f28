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

from tap_eval.device import widest

Rounding = Literal["gptq", "nearest"]
DAMPINGS = (0.05, 0.2, 1.0, 4.0)
"""of the mean diagonal, added to the moments before they are factorized: the more, the fewer images they are from"""
_AT_ONCE = 2**16
"""weights that are rounded to the nearest together: as many as stay in a core's cache"""
_TRACE = 1e-6
_COLUMNS = 64
"""that are rounded one after the other before what they are off is brought to the columns behind them"""
_ALTERNATIONS = 3
"""of rounding with the scale that is best for what was rounded"""
_COARSE, _FINE = torch.linspace(0.3, 1.1, 9).tolist(), (-0.075, -0.05, -0.025, 0.025, 0.05, 0.075)
"""scales that are tried, in parts of that which reaches the greatest weight, and around the best of them"""


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


@dataclass(frozen=True)
class Rounded:
    """`integers` (O, ...) int8 and `scale` (O,) float32, for weights near `integers * scale`."""

    integers: Tensor
    scale: Tensor

    def real(self) -> Tensor:
        """The weight that the integers stand for, float32."""
        return self.integers * self.scale.view(-1, *[1] * (self.integers.dim() - 1))


def nearest(weight: Tensor, bits: int | Sequence[int]) -> Rounded:
    """Rounded to the nearest level, with the scale of least squared error.

    `weight` is (O, ...), and `bits` one number, or one an output channel.
    """
    tops = (2.0 ** (torch.tensor(bits, device=weight.device) - 1) - 1).expand(len(weight))
    rows = max(_AT_ONCE // weight[0].numel(), 1)
    parts = [_nearest(part.flatten(1), top) for part, top in zip(weight.split(rows), tops.split(rows), strict=True)]
    integers, scale = (torch.cat(each) for each in zip(*parts, strict=True))
    return Rounded(integers.view_as(weight), scale)


def _nearest(flat: Tensor, tops: Tensor) -> tuple[Tensor, Tensor]:
    top = tops.unsqueeze(1)
    scale = _scales(flat[None, None], lambda whole: whole, tops[None]).T
    for _ in range(_ALTERNATIONS):
        whole = torch.clamp((flat / scale).round_(), -top, top)
        square = whole.square().sum(1, keepdim=True)
        scale = torch.where(square > 0, (whole * flat).sum(1, keepdim=True) / square.clamp_min(1), scale)
    whole = torch.clamp((flat / scale).round_(), -top, top)
    return whole.to(torch.int8), scale.squeeze(1).float()


def error(weight: Tensor, rounded: Rounded, moments: Tensor) -> float:
    """Mean squared difference of outputs, summed over channels, on inputs with `moments` (G, K, B, B)."""
    off = grouped(rounded.real() - weight, moments)
    return float(((off @ moments) * off).sum(dtype=widest(off.device)))


def gptq(weight: Tensor, fit: Moments, held: Moments | None, bits: Sequence[int]) -> list[Rounded | None]:
    """Rounded column by column, each time making up for it in the columns behind (GPTQ, Frantar et al. 2023).

    `weight` is (O, ...); the moments are of its inputs, `held` of images that are left out. With
    them the damping is chosen, the least with which GPTQ is as good as the nearest there; where
    none is, there is None in its place. All images count in the end. One result for each of `bits`.
    """
    whole = fit if held is None else fit + held
    rows = grouped(weight, whole.matrix)
    around = whole.around_zero()
    scales = [_scales(rows, lambda part: part @ around, _tops(rows, each)) for each in bits]

    def at(moments: Tensor, damping: float, places: Sequence[int]) -> list[Rounded]:
        factor = Factor.of(moments, damping)
        scale, tops = torch.cat([scales[place] for place in places], 1), [_tops(rows, bits[place]) for place in places]
        integers = factor.integers(rows.repeat(1, 1, len(places), 1), scale, torch.cat(tops, 1))
        parts = integers.split(rows.shape[2], 2)
        return [_ungrouped(part, scales[place], weight) for part, place in zip(parts, places, strict=True)]

    if held is None:
        return list(at(around, DAMPINGS[0], range(len(bits))))
    found: list[Rounded | None] = [None] * len(bits)
    least = [error(weight, nearest(weight, each), held.matrix) for each in bits]
    left = list(range(len(bits)))
    for damping in DAMPINGS:
        tried = at(fit.around_zero(), damping, left)
        good = [
            place for place, each in zip(left, tried, strict=True) if error(weight, each, held.matrix) <= least[place]
        ]
        for place, each in zip(good, at(around, damping, good) if good else (), strict=True):
            found[place] = each
        left = [place for place in left if place not in good]
        if not left:
            break
    return found


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


def by_gptq(rows: Tensor, moments: Tensor, tops: Tensor, factor: Factor, weight: Tensor) -> Rounded:
    """By GPTQ, for rows (G, K, R, B) in the place of `weight`, with `tops` (G, R) the greatest integers."""
    scale = _scales(rows, lambda part: part @ moments, tops)
    return _ungrouped(factor.integers(rows, scale, tops), scale, weight)


@dataclass(frozen=True)
class Factor:
    """The lower Cholesky factor (G, K, B, B) of damped moments, inputs by rising diagonal.

    Turned round it is an upper triangular R with H = R R', and what a row is off by `e` costs the
    sum over k of `(e_k R_kk + sum over i < k of e_i R_ik)^2`: each column can make up for those before it,
    and H is never inverted. It is GPTQ (Chen et al. 2025, GPTQ as Babai's nearest plane).
    """

    lower: Tensor
    order: Tensor
    """(G, K, B)"""

    @staticmethod
    def of(moments: Tensor, damping: float) -> Factor:
        """Of moments (G, K, B, B), `damping` times the mean diagonal added."""
        order = moments.diagonal(dim1=2, dim2=3).argsort(2, descending=True).flip(2)
        ordered = moments.gather(2, order.unsqueeze(3).expand_as(moments))
        ordered = ordered.gather(3, order.unsqueeze(2).expand_as(moments))
        ordered = damped(ordered, damping)
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if bool(failed.any()):  # float32 is not enough
            lower = torch.linalg.cholesky(ordered.cpu().double()).to(ordered)
        return Factor(lower, order)

    def divided(self, rows: Tensor) -> Tensor:
        """Rows (G, K, R, B) times the inverse of the moments."""
        order = self.order.unsqueeze(2).expand_as(rows)
        found = torch.cholesky_solve(rows.gather(3, order).transpose(2, 3), self.lower)
        return torch.empty_like(rows).scatter_(3, order, found.transpose(2, 3))

    def integers(self, rows: Tensor, scale: Tensor, tops: Tensor) -> Tensor:
        """Of rows (G, K, R, B) with scales and greatest integers (G, R)."""
        order = self.order.flip(2).unsqueeze(2).expand_as(rows)
        columns = rows.gather(3, order).transpose(2, 3).contiguous()
        upper = self.lower.flip(2, 3)
        upper /= upper.diagonal(dim1=2, dim2=3).unsqueeze(2).clone()
        found, off = torch.empty_like(columns), torch.empty_like(columns)
        size, each, limit = columns.shape[2], scale.unsqueeze(1), tops.unsqueeze(1)
        for start in range(0, size, _COLUMNS):
            stop = min(start + _COLUMNS, size)
            wanted = columns[:, :, start:stop] - upper[:, :, :start, start:stop].transpose(2, 3) @ off[:, :, :start]
            for place in range(start, stop):
                whole = (wanted[:, :, place - start] / each).round_().clamp_(-limit, limit)
                found[:, :, place] = whole
                error = whole * each - columns[:, :, place]
                off[:, :, place] = error
                wanted[:, :, place - start + 1 :] -= upper[:, :, place, place + 1 : stop, None] * error.unsqueeze(2)
        return torch.empty_like(rows).scatter_(3, order, found.transpose(2, 3))


def damped(moments: Tensor, damping: float) -> Tensor:
    """With `damping` times the mean diagonal on the diagonal, in place; a group whose inputs are all zero gets a trace
    of what the largest has."""
    diagonal = moments.diagonal(dim1=2, dim2=3).clamp_(min=0)  # what float32 has lost may make it less
    mean = diagonal.mean(2, keepdim=True)
    diagonal += (damping * mean).clamp_min(max(_TRACE * float(mean.max()), 1e-12))
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
