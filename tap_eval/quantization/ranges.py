"""Which range of an activation tensor becomes integers, chosen from what calibration images show of it.

- `minmax`: from the least number to the greatest.
- `ema`: moving averages of the least and of the greatest number of each image, one image after the other (Jacob et al.
  2018, arXiv:1712.05877, who average over batches of training).
- `percentile`: what leaves a thousandth of the numbers out at either end (McKinstry et al. 2019, arXiv:1809.04191; Wu
  et al. 2020, arXiv:2004.09602).
- `omse`: the range whose integers are off least, in squares (Choukroun et al. 2019, arXiv:1902.06822); it depends on
  how many bits they have.

Any of them is widened to hold zero, as `Affine.covering` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

RangeRule = Literal["minmax", "ema", "percentile", "omse"]
Range = tuple[float, float]
"""the least and the greatest real number"""
Key = TypeVar("Key")
Take = Callable[[Key, Tensor], None]
"""Is told of a tensor, by what it is called."""

_KEPT = 0.9
"""of the average with each image: of the 0.99 and more of training, 16 images would leave little but the first"""
_LEFT_OUT = 1e-3
_TRIED, _TURNS = 32, 3
"""shares of either end of a range that are tried together, in so many turns, each between the neighbours of the best"""
_MOST, _HELD = 2**24, 2**27
"""numbers of a tensor that are looked at, and of several tensors that are held at a time"""


def chosen(rule: RangeRule, images: Sequence[Tensor], bits: int) -> Range:
    """The range of a tensor for integers of `bits`; `images` are its numbers on each of them, in their order."""
    ends = [tuple(float(end) for end in torch.aminmax(values)) for values in images]
    if rule == "ema":
        low, high = ends[0]
        for least, greatest in ends[1:]:
            low, high = _KEPT * low + (1 - _KEPT) * least, _KEPT * high + (1 - _KEPT) * greatest
        return low, high
    if rule == "percentile":
        low, high = np.quantile(_joined(images), (_LEFT_OUT, 1 - _LEFT_OUT))
        return float(low), float(high)
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return (low, high) if rule == "minmax" else _least_error(_joined(images), low, high, bits)


def _joined(images: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([values.flatten() for values in images]).cpu().numpy()


def _least_error(values: np.ndarray, low: float, high: float, bits: int) -> Range:
    """Of ranges within [low, high] and zero the one of least squared error."""
    whole = min(low, 0.0), max(high, 0.0)
    if whole[0] == whole[1]:
        return whole
    errors = _Errors(values, bits)
    spreads = [(1 / _TRIED, 1.0) if end else (0.0, 0.0) for end in whole]
    found = whole
    for _ in range(_TURNS):
        shares = [np.linspace(*spread, _TRIED if spread[1] else 1) for spread in spreads]
        tried = np.stack(np.meshgrid(*shares, indexing="ij"), 2).reshape(-1, 2)
        place = int(errors(tried * whole).argmin())
        found = float(tried[place][0] * whole[0]), float(tried[place][1] * whole[1])
        steps = [each[1] - each[0] if len(each) > 1 else 0.0 for each in shares]
        spreads = [
            (max(share - step, 0.0), min(share + step, 1.0)) for share, step in zip(tried[place], steps, strict=True)
        ]
    return found


class _Errors:
    """What integers of some ranges are off, in squares, but for what is the same for all.

    In numbers that are sorted, those that become one integer lie beside each other, so that sums from the first number
    on give the error of any range without going through them again.
    """

    def __init__(self, values: np.ndarray, bits: int) -> None:
        self._values = np.sort(values)
        self._sums = np.concatenate([[0.0], np.cumsum(self._values, dtype=np.float64)])
        self._whole = np.arange(2**bits)

    def __call__(self, ranges: np.ndarray) -> np.ndarray:
        """Of ranges (R, 2) that hold zero, (R,)."""
        top = self._whole[-1]
        scale = np.maximum((ranges[:, 1] - ranges[:, 0]) / top, 1e-12)[:, None]
        centred = self._whole - np.clip(np.round(-ranges[:, :1] / scale), 0, top)
        places = np.searchsorted(self._values, (scale * (centred[:, :-1] + 0.5)).astype(np.float32))
        first, last = (np.full((len(ranges), 1), end) for end in (0, len(self._values)))
        places = np.concatenate([first, places, last], 1)
        real, counts, sums = scale * centred, np.diff(places, axis=1), np.diff(self._sums[places], axis=1)
        found: np.ndarray = (real * (real * counts - 2 * sums)).sum(1)
        return found


def by_rule(
    rule: RangeRule,
    run: Callable[[Tensor, Take[Key]], None],
    images: Iterable[Tensor],
    sizes: Mapping[Key, int],
    bits: Sequence[int],
) -> dict[Key, dict[int, Range]]:
    """The range at each of `bits` of each tensor in `sizes`, which are how many numbers it has on all images.

    `run` tells of all tensors that a network computes of one of the images (1, C, H, W).
    """
    found: dict[Key, dict[int, Range]] = {}
    images = list(images)
    for group in _together(sizes):
        seen: dict[Key, list[Tensor]] = {key: [] for key in group}
        for image in images:
            parts: dict[Key, list[Tensor]] = {key: [] for key in group}

            def take(key: Key, x: Tensor, parts: dict[Key, list[Tensor]] = parts) -> None:
                if key in parts:
                    parts[key].append(_some(rule, x, sizes[key]))

            run(image, take)
            for key, each in parts.items():
                seen[key] += [torch.cat(each)] if each else []
        for key, values in seen.items():
            same = None if rule == "omse" else chosen(rule, values, max(bits))
            found[key] = {each: same or chosen(rule, values, each) for each in bits}
    return found


def _some(rule: RangeRule, x: Tensor, size: int) -> Tensor:
    """Of a part of a tensor, of so many numbers in all, those that the rule needs, or of too many one in so many."""
    if rule == "ema":
        return torch.stack(torch.aminmax(x))
    every = -(-size // _MOST)
    return x.flatten()[:: every | 1].clone()


def _together(sizes: Mapping[Key, int]) -> Iterator[list[Key]]:
    """Those of tensors of such sizes that are held at a time."""
    group: list[Key] = []
    taken = 0
    for key, size in sizes.items():
        if group and taken + min(size, _MOST) > _HELD:
            yield group
            group, taken = [], 0
        group.append(key)
        taken += min(size, _MOST)
    if group:
        yield group
