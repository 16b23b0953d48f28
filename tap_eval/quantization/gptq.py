"""GPTQ: integers whose products differ least on calibration images, each column making up for those before it.

What GPTQ finds is gone over again, a column at a time, each given all others (coordinate descent, as in QuantEase,
Behdin et al. 2023), with the scale of each channel fitted in closed form between the passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
_SMALL = 2**21
"""second moments of a layer, up to which its calls take longer than what they compute: bits go side by side"""
_TRACE = 1e-6


@torch.inference_mode()
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

    small = whole.matrix.numel() <= _SMALL

    def at(
        moments: Tensor, tasks: Sequence[tuple[float, list[int]]], every: int = 1, passes: int = PASSES
    ) -> Iterator[list[Rounded]]:
        """Of each damping those of the bits at as many places: of small layers all side by side."""
        some = rows[:, :, ::every]
        for part in [tasks] if small and tasks else [[task] for task in tasks]:
            damping = torch.tensor([damping for damping, _ in part], device=weight.device)
            scale, limits = (
                torch.cat([torch.cat([each[place][:, ::every] for place in its], 1) for _, its in part])
                for each in (begun, tops)
            )
            factor = Factor.of(_repeated(moments, len(part)), damping.repeat_interleave(len(rows)).view(-1, 1, 1))
            pairs = zip(
                *(each.split(len(rows)) for each in factor.rounded(_repeated(some, len(part)), scale, limits, passes)),
                strict=True,
            )
            for integers, its in pairs:
                each = zip(integers.split(some.shape[2], 2), its.split(some.shape[2], 1), strict=True)
                yield [ungrouped(*pair, weight) for pair in each]

    every_bits = [*range(len(bits))]
    if held is None:
        return [(each, DAMPINGS[0]) for each in next(at(whole.matrix, [(DAMPINGS[0], every_bits)]))]
    every = thinning(weight, len(rows))
    judged = weight.unflatten(0, (len(rows), -1))[:, ::every].flatten(0, 1)
    errors = [
        [error(judged, each, held.matrix) for each in found]
        for found in at(fit.matrix, [(damping, every_bits) for damping in DAMPINGS], every, passes=0)
    ]
    least = [min(zip(each, DAMPINGS, strict=True)) for each in zip(*errors, strict=True)]
    chosen = {
        place: damping
        for place, (off, damping) in enumerate(least)
        if off <= error(judged, nearest(judged, bits[place]), held.matrix)
    }
    tasks = [(damping, [place]) for place, damping in chosen.items()]
    if not small:
        tasks = [(damping, [place for place in chosen if chosen[place] == damping]) for damping in set(chosen.values())]
    found: list[tuple[Rounded, float] | None] = [None] * len(bits)
    for (damping, its), those in zip(tasks, at(whole.matrix, tasks), strict=True):
        for place, rounded in zip(its, those, strict=True):
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
    found = scales(cut.repeat(1, 1, len(tops), 1), lambda whole: whole @ near, torch.cat([*tops], 1))
    return [*found.split(count, 1)]


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
    def of(moments: Tensor, damping: float | Tensor) -> Factor:
        """Of moments (G, K, B, B), `damping`, one number or (G, 1, 1), times the mean diagonal added."""
        excess = _ridge(moments, damping) - _ridge(moments, DAMPINGS[0])
        moments = _damped(moments, damping)
        order = moments.diagonal(dim1=2, dim2=3).argsort(2, descending=True).flip(2)
        lower, failed = torch.linalg.cholesky_ex(_reordered(moments, order))
        if bool(failed.any()):  # float32 is not enough
            lower = torch.linalg.cholesky(_reordered(moments, order).cpu().double()).to(moments)
        return Factor(moments, excess, lower, order)

    def divided(self, rows: Tensor) -> Tensor:
        """Rows (G, K, R, B) times the inverse of the moments."""
        order = self.order.unsqueeze(2).expand_as(rows)
        found = torch.cholesky_solve(rows.gather(3, order).transpose(2, 3), self.lower)
        return torch.empty_like(rows).scatter_(3, order, found.transpose(2, 3))

    def rounded(self, rows: Tensor, scale: Tensor, tops: Tensor, passes: int = PASSES) -> tuple[Tensor, Tensor]:
        """Integers (G, K, n R, B) of rows (G, K, R, B) and their scales (G, n R), given scales to begin with and
        greatest integers, of the rows as many times as there are.

        They are those of GPTQ after some `passes` over them.
        """
        found, cost = self._swept(rows, scale, tops)
        return self._descended(found, cost, rows, scale, tops, passes)

    def integers(self, rows: Tensor, scale: Tensor, tops: Tensor) -> Tensor:
        """By GPTQ alone, with these scales."""
        return self._swept(rows, scale, tops)[0].transpose(2, 3).contiguous()

    def _swept(self, rows: Tensor, scale: Tensor, tops: Tensor) -> tuple[Tensor, Tensor]:
        """Integers (G, K, B, n R) by GPTQ, and what each row is off by the moments, (G, n R)."""
        order = self.order.unsqueeze(2).expand_as(rows)
        columns = _times(rows.gather(3, order).transpose(2, 3), scale)
        found, off = torch.empty_like(columns), torch.empty_like(columns)
        each, limit, cost = scale.unsqueeze(1), tops.unsqueeze(1), torch.zeros_like(scale)
        for stop in range(columns.shape[2], 0, -_COLUMNS):
            start = max(stop - _COLUMNS, 0)
            near, beyond = self.lower[:, :, start:stop, start:stop], self.lower[:, :, stop:, start:stop]
            diagonal = near.diagonal(dim1=2, dim2=3)
            wanted = columns[:, :, start:stop] - (beyond.transpose(2, 3) @ off[:, :, stop:]) / diagonal.unsqueeze(3)
            pull = (near / diagonal.unsqueeze(2)).unsqueeze(4)
            parts = (part[:, :, start:stop].unbind(2) for part in (columns, found, off))
            for place, column, whole, left in reversed([*zip(range(stop - start), *parts, strict=True)]):
                torch.div(wanted[:, :, place], each, out=whole).round_().clamp_(-limit, limit)
                torch.mul(whole, each, out=left).sub_(column)
                wanted[:, :, :place].addcmul_(pull[:, :, place, :place], left.unsqueeze(2), value=-1)
            wanted.addcmul_(found[:, :, start:stop], each.unsqueeze(2), value=-1).mul_(diagonal.unsqueeze(3))
            cost += wanted.square_().sum((1, 2))
        return torch.empty_like(found).scatter_(2, self.order.unsqueeze(3).expand_as(found), found), cost

    def _descended(
        self, found: Tensor, cost: Tensor, rows: Tensor, scale: Tensor, tops: Tensor, passes: int
    ) -> tuple[Tensor, Tensor]:
        """With `q` the integers, w the row, s its scale, `e = q - w / s`, column j is best at `q_j - (H e)_j / H_jj`.

        What a scale is fitted with follows from what the row is off, the `cost`, which is
        `s^2 q H q - 2 s q H w + w H w`; each step changes it by what is known, so that a pass multiplies by H once.
        """
        wanted = rows.transpose(2, 3)
        aims, wanted = (_times(each, scale) for each in (self.moments @ wanted, wanted))
        diagonal, limit = self.moments.diagonal(dim1=2, dim2=3).unsqueeze(3), tops.unsqueeze(1)
        excess, whole = self.excess.unsqueeze(3), (wanted * aims).sum((1, 2))

        def refitted() -> tuple[Tensor, Tensor, Tensor]:
            cross = (found * aims).sum((1, 2))
            square = (cost + 2 * scale * cross - whole) / scale.square()
            return (
                fitted(
                    cross - (excess * found * wanted).sum((1, 2)), square - (excess * found.square()).sum((1, 2)), scale
                ),
                square,
                cross,
            )

        now, square, cross = refitted()
        for _ in range(passes):
            scale = now
            cost = scale.square() * square - 2 * scale * cross + whole
            off = found - wanted / scale[:, None, None]
            for start in range(0, found.shape[2], _COLUMNS):
                columns = slice(start, min(start + _COLUMNS, found.shape[2]))
                left, each = self.moments[:, :, columns] @ off, diagonal[:, :, columns]
                near, steps = self.moments[:, :, columns, columns].unsqueeze(4), torch.empty_like(left)
                inverse = each.reciprocal()
                parts = zip(*(part.unbind(2) for part in (found[:, :, columns], left, inverse, steps)), strict=True)
                for place, (was, slope, by, step) in enumerate(parts):
                    torch.addcmul(was, slope, by, value=-1, out=step).round_().clamp_(-limit, limit).sub_(was)
                    was.add_(step)
                    left[:, :, place + 1 :].addcmul_(near[:, :, place + 1 :, place], step.unsqueeze(2))
                off[:, :, columns] += steps
                cost = cost + scale.square() * (left.mul_(2).addcmul_(each, steps) * steps).sum((1, 2))
            now, square, cross = refitted()
        return found.transpose(2, 3), now


def _repeated(tensor: Tensor, count: int) -> Tensor:
    """So many times, one after the other along the first dimension."""
    return tensor if count == 1 else torch.cat([tensor] * count)


def _reordered(moments: Tensor, order: Tensor) -> Tensor:
    """Moments (G, K, B, B) of the inputs in the order (G, K, B)."""
    if order.numel() == order.shape[2]:  # whole rows are taken faster, and columns are rows of what is symmetric
        rows = moments[0, 0].index_select(0, order.flatten())
        return rows.T.contiguous().index_select(0, order.flatten())[None, None]
    ordered = moments.gather(2, order.unsqueeze(3).expand_as(moments))
    return ordered.gather(3, order.unsqueeze(2).expand_as(moments))


def _times(columns: Tensor, scale: Tensor) -> Tensor:
    """Columns (G, K, B, R), contiguous, as many times as there are scales (G, n R) for them."""
    return columns.repeat(1, 1, 1, scale.shape[1] // columns.shape[3])


def _damped(moments: Tensor, damping: float | Tensor) -> Tensor:
    """With `damping` times the mean diagonal on the diagonal."""
    damped = moments.clone()
    damped.diagonal(dim1=2, dim2=3).add_(_ridge(moments, damping))
    return damped


def _ridge(moments: Tensor, damping: float | Tensor) -> Tensor:
    """What damping adds to the diagonal, (G, K, B); to a group whose inputs are all zero a trace of what the largest
    has."""
    diagonal = moments.diagonal(dim1=2, dim2=3)
    kept = diagonal.clamp_min(0)  # what float32 has lost may make it less
    mean = kept.mean(2, keepdim=True)
    return (damping * mean).clamp_min(max(_TRACE * float(mean.max()), 1e-12)) + (kept - diagonal)
