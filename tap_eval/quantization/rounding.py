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
from tap_eval.quantization.moments import Few, Moments

Rounding = Literal["gptq", "nearest"]
_AT_ONCE = 2**16
"""weights that are rounded to the nearest together: as many as stay in a core's cache"""
_ALTERNATIONS = 3
"""of rounding with the scale that is best for what was rounded"""
_SHARES, _BESIDE = torch.linspace(0.3, 1.1, 9).tolist(), (-0.075, -0.05, -0.025, 0.025, 0.05, 0.075)
"""scales that are tried, in parts of that which reaches the greatest weight, and beside the best of them"""


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
    scale = scales(flat[None, None], lambda whole: whole, tops[None], _BESIDE).T
    for _ in range(_ALTERNATIONS):
        whole = torch.clamp((flat / scale).round_(), -top, top)
        square = whole.square().sum(1, keepdim=True)
        scale = torch.where(square > 0, (whole * flat).sum(1, keepdim=True) / square.clamp_min(1), scale)
    whole = torch.clamp((flat / scale).round_(), -top, top)
    return whole.to(torch.int8), scale.squeeze(1).float()


def error(weight: Tensor, rounded: Rounded, moments: Moments | Few) -> float:
    """Mean squared difference of outputs, summed over channels, on the inputs of `moments`."""
    off = grouped(rounded.real() - weight, moments)
    return float(moments.cost(off).sum(dtype=widest(off.device)))


def grouped(weight: Tensor, moments: Moments | Few) -> Tensor:
    """(O, ...) as (G, K, O / G, B), filled up with zeros."""
    return in_blocks(weight, *moments.mean.shape)


def in_blocks(weight: Tensor, groups: int, blocks: int, size: int) -> Tensor:
    """(O, ...) as (G, K, O / G, B), filled up with zeros."""
    flat = weight.reshape(groups, len(weight) // groups, -1)
    flat = F.pad(flat, (0, blocks * size - flat.shape[2]))
    return flat.view(groups, -1, blocks, size).transpose(1, 2)


def scales(rows: Tensor, multiplied: Callable[[Tensor], Tensor], tops: Tensor, beside: Sequence[float] = ()) -> Tensor:
    """The scales (G, R) at which rounding to the nearest is least off by the moments `H`, as `multiplied` by which.

    Each scale of a grid, and of those `beside` the best of them, gives integers `q`, for which
    `q H w / q H q` is the best scale; its error is `w H w - (q H w)^2 / q H q`.
    """
    peak = rows.abs().amax((1, 3)).clamp_min(1e-12)
    limit = tops[:, None, :, None].to(rows.dtype)
    best_gain = torch.full_like(peak, -torch.inf)
    best_scale, best_share = peak / tops, torch.ones_like(peak)

    def attempt(share: Tensor) -> None:
        nonlocal best_gain, best_scale, best_share
        step = peak * share / tops
        whole = (rows / step[:, None, :, None]).round_().clamp_(-limit, limit)
        product = multiplied(whole)
        square, cross = (product * whole).sum((1, 3)), (product * rows).sum((1, 3))
        scale = fitted(cross, square, step)
        gain = 2 * scale * cross - scale.square() * square
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale, best_share = torch.where(better, scale, best_scale), torch.where(better, share, best_share)

    for share in _SHARES:
        attempt(torch.full_like(peak, share))
    middle = best_share
    for step in beside:
        attempt(middle + step)
    return best_scale


def fitted(cross: Tensor, square: Tensor, otherwise: Tensor) -> Tensor:
    """The scale of least squared error, from the integers' products with the weight and with themselves.

    It is `otherwise` where integers are zero, or point the other way.
    """
    return torch.where((square > 0) & (cross > 0), cross / square.clamp_min(1e-30), otherwise)
