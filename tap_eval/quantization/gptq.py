"""GPTQ: integers whose products differ least on calibration images, each column making up for those before it.

What GPTQ finds is gone over again, a column at a time, each given all others (coordinate descent, as in QuantEase,
Behdin et al. 2023), with the scale of each channel fitted in closed form between the passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tap_eval.quantization.factor import DAMPINGS, PASSES, Factor, ridge
from tap_eval.quantization.moments import Few, Moments, side_by_side
from tap_eval.quantization.rounding import Rounded, error, grouped, nearest, scales

_JUDGED = 128
"""output channels of a group, as good as, on which a damping is judged"""
_SEARCHED = 512
"""inputs with which a scale is searched together; what more of them have in common counts from there on"""
_SMALL = 2**21
"""numbers that hold a layer's second moments, up to which calls take longer than what they compute: bits go side by
side"""


@torch.inference_mode()
def gptq(
    weight: Tensor, fit: Moments | Few, held: Moments | Few | None, bits: Sequence[int]
) -> list[tuple[Rounded, float] | None]:
    """Weights (O, ...) rounded by GPTQ (Frantar et al. 2023) to each of `bits`, and the damping with which they are.

    The moments are of the weight's inputs, `held` of images that are left out. On these the
    damping is chosen, by GPTQ alone, on some output channels of large layers; where none is as
    good as the nearest, there is None. All images count in the end.
    """
    whole = fit if held is None else _joined(fit, held)
    rows = grouped(weight, whole)
    tops = [torch.full((len(rows), rows.shape[2]), 2.0 ** (each - 1) - 1, device=weight.device) for each in bits]
    begun = searched(rows, whole, tops)
    small = whole.held <= _SMALL

    def at(
        moments: Moments | Few, tasks: Sequence[tuple[float, list[int]]], every: int = 1, passes: int = PASSES
    ) -> Iterator[list[Rounded]]:
        """Of each damping those of the bits at as many places: of small layers all side by side."""
        some = rows[:, :, ::every]
        for part in [tasks] if small and tasks else [[task] for task in tasks]:
            damping = torch.tensor([damping for damping, _ in part], device=weight.device)
            scale, limits = (
                torch.cat([torch.cat([each[place][:, ::every] for place in its], 1) for _, its in part])
                for each in (begun, tops)
            )
            factor = Factor.of(side_by_side([moments] * len(part)), damping.repeat_interleave(len(rows)).view(-1, 1, 1))
            found = factor.rounded(some.repeat(len(part), 1, 1, 1), scale, limits, passes)
            pairs = zip(*(each.split(len(rows)) for each in found), strict=True)
            for integers, its in pairs:
                each = zip(integers.split(some.shape[2], 2), its.split(some.shape[2], 1), strict=True)
                yield [ungrouped(*pair, weight) for pair in each]

    every_bits = [*range(len(bits))]
    if held is None:
        return [(each, DAMPINGS[0]) for each in next(at(whole, [(DAMPINGS[0], every_bits)]))]
    every = thinning(weight, len(rows))
    judged = weight.unflatten(0, (len(rows), -1))[:, ::every].flatten(0, 1)
    errors = [
        [error(judged, each, held) for each in found]
        for found in at(fit, [(damping, every_bits) for damping in DAMPINGS], every, passes=0)
    ]
    least = [min(zip(each, DAMPINGS, strict=True)) for each in zip(*errors, strict=True)]
    chosen = {
        place: damping
        for place, (off, damping) in enumerate(least)
        if off <= error(judged, nearest(judged, bits[place]), held)
    }
    tasks = [(damping, [place]) for place, damping in chosen.items()]
    if not small:
        tasks = [(damping, [place for place in chosen if chosen[place] == damping]) for damping in set(chosen.values())]
    found: list[tuple[Rounded, float] | None] = [None] * len(bits)
    for (damping, its), those in zip(tasks, at(whole, tasks), strict=True):
        for place, rounded in zip(its, those, strict=True):
            found[place] = rounded, damping
    return found


def thinning(weight: Tensor, groups: int) -> int:
    """Of a group's output channels, which do not interact, each so-manyth is enough to judge what all share."""
    return -(-len(weight) // groups // _JUDGED) or 1


def _joined(fit: Moments | Few, held: Moments | Few) -> Moments | Few:
    """Of all images, whose positions are few or many together."""
    if isinstance(fit, Few):
        assert isinstance(held, Few)
        return fit + held
    assert isinstance(held, Moments)
    return fit + held


def searched(rows: Tensor, moments: Moments | Few, tops: Sequence[Tensor]) -> list[Tensor]:
    """Scales (G, R) to begin with for rows (G, K, R, B), one for each of `tops` (G, R), the greatest integers, by the
    least damping."""
    groups, blocks, count, size = rows.shape
    parts = -(-size // _SEARCHED)
    part = -(-size // parts)
    added = F.pad(ridge(moments.diagonal, DAMPINGS[0]), (0, parts * part - size))
    near = moments.near(part).reshape(groups, -1, part, part).clone()
    near.diagonal(dim1=2, dim2=3).add_(added.view(groups, -1, part))
    cut = F.pad(rows, (0, parts * part - size)).view(groups, blocks, count, parts, part)
    cut = cut.transpose(2, 3).reshape(groups, -1, count, part)
    found = scales(cut.repeat(1, 1, len(tops), 1), lambda whole: whole @ near, torch.cat([*tops], 1))
    return [*found.split(count, 1)]


def ungrouped(rows: Tensor, scale: Tensor, weight: Tensor) -> Rounded:
    """Integers as `grouped` gives rows, in the shape of rows of `weight`, with their scales (G, R)."""
    flat = rows.transpose(1, 2).flatten(2)[..., : weight[0].numel()]
    return Rounded(
        flat.reshape(-1, *weight.shape[1:]).to(torch.int8).contiguous(), scale.flatten().float().contiguous()
    )
