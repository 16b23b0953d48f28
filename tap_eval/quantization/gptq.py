"""GPTQ: integers whose products differ least on calibration images, each column making up for those before it.

What GPTQ finds is gone over again, a column at a time, each given all others (coordinate descent, as in QuantEase,
Behdin et al. 2023), with the scale of each channel fitted in closed form between the passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tap_eval.quantization.rounding import Moments, Rounded, error, fitted, grouped, nearest, scales

DAMPINGS = (0.02, 0.2, 2.0)
"""of the mean diagonal, added to the moments before they are factorized: the more, the fewer images they are from"""
PASSES = 2
"""over all columns after GPTQ"""
_COLUMNS = 64
"""that are rounded one after the other before what they are off is brought to the other columns"""
_JUDGED = 128
"""output channels of a group, as good as, on which a damping is judged"""
_SEARCHED = 512
"""inputs with which a scale is searched together; what more of them have in common counts from there on"""
_TRACE = 1e-6


@torch.no_grad()
def gptq(weight: Tensor, fit: Moments, held: Moments | None, bits: Sequence[int]) -> list[tuple[Rounded, float] | None]:
    """Weights (O, ...) rounded by GPTQ (Frantar et al. 2023) to each of `bits`, and the damping with which they are.

    The moments are of the weight's inputs, `held` of images that are left out. On these the
    damping is chosen, by GPTQ alone, on some output channels of large layers; where none is as
    good as the nearest, there is None. All images count in the end.
    """
    whole = fit if held is None else fit + held
    rows = grouped(weight, whole.matrix)
    tops = [torch.full((len(rows), rows.shape[2]), 2.0 ** (each - 1) - 1, device=weight.device) for each in bits]
    begun = searched(rows, _damped(whole.matrix, DAMPINGS[0]), tops)

    def at(
        moments: Tensor, damping: float, places: Sequence[int], every: int = 1, passes: int = PASSES
    ) -> list[Rounded]:
        some = rows[:, :, ::every]
        scale, limits = (torch.cat([each[place][:, ::every] for place in places], 1) for each in (begun, tops))
        integers, scale = Factor.of(moments, damping).rounded(some.repeat(1, 1, len(places), 1), scale, limits, passes)
        parts = zip(integers.split(some.shape[2], 2), scale.split(some.shape[2], 1), strict=True)
        return [ungrouped(*part, weight) for part in parts]

    if held is None:
        return [(each, DAMPINGS[0]) for each in at(whole.matrix, DAMPINGS[0], range(len(bits)))]
    every = thinning(weight, len(rows))
    judged = weight.unflatten(0, (len(rows), -1))[:, ::every].flatten(0, 1)
    errors = [
        [error(judged, each, held.matrix) for each in at(fit.matrix, damping, range(len(bits)), every, passes=0)]
        for damping in DAMPINGS
    ]
    found: list[tuple[Rounded, float] | None] = [None] * len(bits)
    least = [min(zip(each, DAMPINGS, strict=True)) for each in zip(*errors, strict=True)]
    for damping in DAMPINGS:
        places = [
            place
            for place, each in enumerate(bits)
            if least[place][1] == damping and least[place][0] <= error(judged, nearest(judged, each), held.matrix)
        ]
        for place, rounded in zip(places, at(whole.matrix, damping, places) if places else (), strict=True):
            found[place] = rounded, damping
    return found


def thinning(weight: Tensor, groups: int) -> int:
    """Of a group's output channels, which do not interact, each so-manyth is enough to judge what all share."""
    return -(-len(weight) // groups // _JUDGED) or 1


def searched(rows: Tensor, moments: Tensor, tops: Sequence[Tensor]) -> list[Tensor]:
    """Scales (G, R) to begin with for rows (G, K, R, B), one for each of `tops` (G, R), the greatest integers."""
    groups, blocks, count, size = rows.shape
    parts = -(-size // _SEARCHED)
    part = -(-size // parts)
    filled = F.pad(moments, (0, parts * part - size) * 2).view(groups, blocks, parts, part, parts, part)
    near = filled.diagonal(dim1=2, dim2=4).movedim(-1, 2).reshape(groups, -1, part, part)
    cut = F.pad(rows, (0, parts * part - size)).view(groups, blocks, count, parts, part)
    cut = cut.transpose(2, 3).reshape(groups, -1, count, part)
    return [scales(cut, lambda whole: whole @ near, each) for each in tops]


def ungrouped(rows: Tensor, scale: Tensor, weight: Tensor) -> Rounded:
    """Integers as `grouped` gives rows, in the shape of rows of `weight`, with their scales (G, R)."""
    flat = rows.transpose(1, 2).flatten(2)[..., : weight[0].numel()]
    return Rounded(
        flat.reshape(-1, *weight.shape[1:]).to(torch.int8).contiguous(), scale.flatten().float().contiguous()
    )


@dataclass(frozen=True)
class Factor:
    """Damped moments H (G, K, B, B) and their lower Cholesky factor, inputs by rising diagonal.

    Turned round it is an upper triangular R with H = R R', and what a row is off by `e` costs the
    sum over k of `(e_k R_kk + sum over i < k of e_i R_ik)^2`: each column can make up for those before it,
    and H is never inverted. It is GPTQ (Chen et al. 2025, GPTQ as Babai's nearest plane).
    """

    moments: Tensor
    excess: Tensor
    """(G, K, B), on the diagonal, above the least damping, with which scales are fitted"""
    lower: Tensor
    order: Tensor
    """(G, K, B)"""

    @staticmethod
    def of(moments: Tensor, damping: float) -> Factor:
        """Of moments (G, K, B, B), `damping` times the mean diagonal added."""
        excess = _ridge(moments, damping) - _ridge(moments, DAMPINGS[0])
        moments = _damped(moments, damping)
        order = moments.diagonal(dim1=2, dim2=3).argsort(2, descending=True).flip(2)
        ordered = moments.gather(2, order.unsqueeze(3).expand_as(moments))
        ordered = ordered.gather(3, order.unsqueeze(2).expand_as(moments))
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if bool(failed.any()):  # float32 is not enough
            lower = torch.linalg.cholesky(ordered.cpu().double()).to(ordered)
        return Factor(moments, excess, lower, order)

    def divided(self, rows: Tensor) -> Tensor:
        """Rows (G, K, R, B) times the inverse of the moments."""
        order = self.order.unsqueeze(2).expand_as(rows)
        found = torch.cholesky_solve(rows.gather(3, order).transpose(2, 3), self.lower)
        return torch.empty_like(rows).scatter_(3, order, found.transpose(2, 3))

    def rounded(self, rows: Tensor, scale: Tensor, tops: Tensor, passes: int = PASSES) -> tuple[Tensor, Tensor]:
        """Integers (G, K, R, B) of rows and their scales (G, R), given scales to begin with and greatest integers.

        They are those of GPTQ after some `passes` over them.
        """
        return self._descended(self.integers(rows, scale, tops), rows, scale, tops, passes)

    def integers(self, rows: Tensor, scale: Tensor, tops: Tensor) -> Tensor:
        """By GPTQ alone, with these scales."""
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

    def _descended(
        self, integers: Tensor, rows: Tensor, scale: Tensor, tops: Tensor, passes: int
    ) -> tuple[Tensor, Tensor]:
        """With `q` the integers, w the row and s its scale, column j is best at `q_j - (q H - w H / s)_j / H_jj`."""
        found, wanted = (each.transpose(2, 3).contiguous() for each in (integers, rows))
        products, aims = self.moments @ found, self.moments @ wanted
        weights = self.moments.diagonal(dim1=2, dim2=3).reciprocal().unsqueeze(3)
        limit, size = tops.unsqueeze(1), found.shape[2]
        excess = self.excess.unsqueeze(3)
        scale = _refitted(found, products - excess * found, aims - excess * wanted, scale)
        for _ in range(passes):
            for start in range(0, size, _COLUMNS):
                columns = slice(start, min(start + _COLUMNS, size))
                before, near = found[:, :, columns].clone(), self.moments[:, :, columns, columns]
                left = products[:, :, columns] - aims[:, :, columns] / scale[:, None, None]
                for place in range(before.shape[2]):
                    now, was = found[:, :, start + place], before[:, :, place]
                    torch.addcmul(was, left[:, :, place], weights[:, :, start + place], value=-1, out=now)
                    now.round_().clamp_(-limit, limit)
                    left[:, :, place + 1 :] += near[:, :, place + 1 :, place, None] * (now - was).unsqueeze(2)
                products += self.moments[:, :, :, columns] @ (found[:, :, columns] - before)
            scale = _refitted(found, products - excess * found, aims - excess * wanted, scale)
        return found.transpose(2, 3), scale


def _refitted(found: Tensor, products: Tensor, aims: Tensor, scale: Tensor) -> Tensor:
    """The best scales (G, R) of integers `found` with H times them and H times what is aimed at, all (G, K, B, R)."""
    return fitted((found * aims).sum((1, 2)), (found * products).sum((1, 2)), scale)


def _damped(moments: Tensor, damping: float) -> Tensor:
    """With `damping` times the mean diagonal on the diagonal."""
    damped = moments.clone()
    damped.diagonal(dim1=2, dim2=3).add_(_ridge(moments, damping))
    return damped


def _ridge(moments: Tensor, damping: float) -> Tensor:
    """What damping adds to the diagonal, (G, K, B); to a group whose inputs are all zero a trace of what the largest
    has."""
    diagonal = moments.diagonal(dim1=2, dim2=3)
    kept = diagonal.clamp_min(0)  # what float32 has lost may make it less
    mean = kept.mean(2, keepdim=True)
    return (damping * mean).clamp_min(max(_TRACE * float(mean.max()), 1e-12)) + (kept - diagonal)
