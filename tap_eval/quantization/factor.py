"""Damped moments taken apart column by column, by which GPTQ and the passes after it round rows.

With lower Cholesky factor L of the damped moments H, inputs by rising diagonal, what a row is off
by `e` costs the sum over k of `(L_kk e_k + sum over i > k of L_ik e_i)^2`: from the last on each
column can make up for those before it, and H is never inverted. It is GPTQ (Chen et al. 2025,
GPTQ as Babai's nearest plane).

Of few positions, with inputs X at them and H = X X' + r I, L is never formed either. A block of
columns needs its own part of L, and what the columns behind it pull at it; both follow from
`M = r (X' X + r I)^-1` of the columns before it, which is of positions, and is built up block by block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tap_eval.quantization.moments import Few, Moments
from tap_eval.quantization.rounding import fitted

DAMPINGS = (0.02, 0.2, 2.0)
"""of the mean diagonal, added to the moments before they are factorized: the more, the fewer images they are from"""
PASSES = 2
"""over all columns after GPTQ"""
_COLUMNS = 128
"""that are rounded before what they are off is brought to all other columns"""
_TOGETHER = 16
"""of these, that are rounded before it is brought to the others of them"""
_LARGE = 256
"""inputs from which moments are put in order a block at a time"""
_TRACE = 1e-12


@dataclass(frozen=True)
class Factor(ABC):
    """Damped moments H of G groups of K blocks of B inputs."""

    diagonal: Tensor
    """(G, K, B)"""
    excess: Tensor
    """(G, K, B), on the diagonal, above the least damping, with which scales are fitted"""
    order: Tensor
    """(G, K, B), by rising diagonal"""
    near: list[Tensor]
    """blocks of the Cholesky factor on its diagonal, each of the columns that are rounded together"""

    @staticmethod
    def of(moments: Moments | Few, damping: float | Tensor) -> Factor:
        """Of `moments`, with `damping`, one number or (G, 1, 1), times the mean diagonal added."""
        return _OfFew.of_few(moments, damping) if isinstance(moments, Few) else _OfMany.of_many(moments, damping)

    @abstractmethod
    def times(self, columns: Tensor) -> Tensor:
        """H times columns (G, K, B, R)."""

    def moved(self, rows: Tensor, lost: Tensor) -> Tensor:
        """Rows (G, K, R, B) that give what is `lost` at the output too, by ridge regression; see `Sums.lost`.

        What blocks have in common is not known. The square of a sum of K terms is at most K times the sum of their
        squares, so a K-th of what each block would do alone takes all together no further from what is lost.
        """
        return rows + self._toward(lost) / rows.shape[1]

    @abstractmethod
    def _toward(self, lost: Tensor) -> Tensor:
        """What each block, by itself, would add for what is `lost`."""

    @abstractmethod
    def _nothing(self, columns: Tensor) -> Tensor:
        """What is known of columns (G, K, B, R) that are not off."""

    @abstractmethod
    def _pull(self, known: Tensor, block: slice) -> Tensor:
        """What the columns behind a block, in order, pull at it by what they are off."""

    @abstractmethod
    def _put(self, known: Tensor, block: slice, off: Tensor) -> None:
        """A block in order is off by `off`."""

    @abstractmethod
    def _seen(self, off: Tensor) -> Tensor:
        """What is known of columns (G, K, B, R) that are off."""

    @abstractmethod
    def _slope(self, known: Tensor, off: Tensor, block: slice) -> Tensor:
        """H times what they are off, of a block of columns."""

    @abstractmethod
    def _block(self, block: slice) -> Tensor:
        """Of H, but for damping."""

    @abstractmethod
    def _step(self, known: Tensor, off: Tensor, block: slice, steps: Tensor) -> None:
        """A block of columns is off by `steps` more."""

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
        columns = _times(rows.gather(3, order).transpose(2, 3), scale).div_(scale[:, None, None])
        found, known = torch.empty_like(columns), self._nothing(columns)
        limit, cost = tops.unsqueeze(1), torch.zeros_like(scale)
        low = -limit
        for block, near in zip(reversed(_blocks(columns.shape[2])), reversed(self.near), strict=True):
            diagonal = near.diagonal(dim1=2, dim2=3)
            pull = near / diagonal.unsqueeze(2)
            wanted = columns[:, :, block] - self._pull(known, block) / diagonal.unsqueeze(3)
            off = torch.empty_like(wanted)
            parts = (part.unbind(2) for part in (columns[:, :, block], found[:, :, block], off))
            steps = [*zip(range(off.shape[2]), *parts, strict=True)]
            for some in reversed(_blocks(off.shape[2], _TOGETHER)):
                its, by = wanted[:, :, some], pull[:, :, some, some].unsqueeze(4)
                for place, column, whole, left in reversed(steps[some]):
                    here = place - some.start
                    torch.round(its[:, :, here], out=whole).clamp_(low, limit)
                    torch.sub(whole, column, out=left)
                    its[:, :, :here].addcmul_(by[:, :, here, :here], left.unsqueeze(2), value=-1)
                wanted[:, :, : some.start] -= pull[:, :, some, : some.start].mT @ off[:, :, some]
            self._put(known, block, off)
            wanted.sub_(found[:, :, block]).mul_(diagonal.unsqueeze(3))
            cost += wanted.square_().sum((1, 2))
        integers = torch.empty_like(found).scatter_(2, self.order.unsqueeze(3).expand_as(found), found)
        return integers, cost.mul_(scale.square())

    def _descended(
        self, found: Tensor, cost: Tensor, rows: Tensor, scale: Tensor, tops: Tensor, passes: int
    ) -> tuple[Tensor, Tensor]:
        """With `q` the integers, w the row, s its scale, `e = q - w / s`, column j is best at `q_j - (H e)_j / H_jj`.

        What a scale is fitted with follows from what the row is off, the `cost`, which is
        `s^2 q H q - 2 s q H w + w H w`; each step changes it by what is known, so that a pass multiplies by H once.
        """
        wanted = rows.transpose(2, 3)
        aims, wanted = (_times(each, scale) for each in (self.times(wanted), wanted))
        diagonal, limit = self.diagonal.unsqueeze(3), tops.unsqueeze(1)
        low = -limit
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
            known = self._seen(off)
            for block in _blocks(found.shape[2]):
                each = diagonal[:, :, block]
                left, near = self._slope(known, off, block).div_(each), self._block(block) / each
                steps = torch.empty_like(left)
                parts = [*zip(*(part.unbind(2) for part in (found[:, :, block], left, steps)), strict=True)]
                for some in _blocks(left.shape[2], _TOGETHER):
                    its, by = left[:, :, some], near[:, :, some, some].unsqueeze(4)
                    for place, (was, slope, step) in enumerate(parts[some]):
                        torch.sub(was, slope, out=step).round_().clamp_(low, limit).sub_(was)
                        its[:, :, place + 1 :].addcmul_(by[:, :, place + 1 :, place], step.unsqueeze(2))
                    left[:, :, some.stop :] += near[:, :, some.stop :, some] @ steps[:, :, some]
                found[:, :, block] += steps
                self._step(known, off, block, steps)
                cost = cost + scale.square() * (left.mul_(2).add_(steps).mul_(each) * steps).sum((1, 2))
            now, square, cross = refitted()
        return found.transpose(2, 3), now


@dataclass(frozen=True)
class _OfMany(Factor):
    """With H and L themselves, (G, K, B, B)."""

    moments: Tensor
    lower: Tensor

    @staticmethod
    def of_many(moments: Moments, damping: float | Tensor) -> _OfMany:
        """See `Factor.of`."""
        excess = ridge(moments.diagonal, damping) - ridge(moments.diagonal, DAMPINGS[0])
        damped = moments.matrix.clone()
        damped.diagonal(dim1=2, dim2=3).add_(ridge(moments.diagonal, damping))
        diagonal = damped.diagonal(dim1=2, dim2=3)
        order = diagonal.argsort(2, descending=True).flip(2)
        lower, failed = torch.linalg.cholesky_ex(_reordered(damped, order))
        if bool(failed.any()):  # float32 is not enough
            lower = torch.linalg.cholesky(_reordered(damped, order).cpu().double()).to(damped)
        near = [lower[:, :, block, block] for block in _blocks(lower.shape[2])]
        return _OfMany(diagonal, excess, order, near, damped, lower)

    def times(self, columns: Tensor) -> Tensor:
        return self.moments @ columns

    def _toward(self, lost: Tensor) -> Tensor:
        order = self.order.unsqueeze(2).expand_as(lost)
        found = torch.cholesky_solve(lost.gather(3, order).transpose(2, 3), self.lower)
        return torch.empty_like(lost).scatter_(3, order, found.transpose(2, 3))

    def _nothing(self, columns: Tensor) -> Tensor:
        return torch.empty_like(columns)

    def _pull(self, known: Tensor, block: slice) -> Tensor:
        return self.lower[:, :, block.stop :, block].mT @ known[:, :, block.stop :]

    def _put(self, known: Tensor, block: slice, off: Tensor) -> None:
        known[:, :, block] = off

    def _seen(self, off: Tensor) -> Tensor:
        return off

    def _slope(self, known: Tensor, off: Tensor, block: slice) -> Tensor:
        return self.moments[:, :, block] @ off

    def _block(self, block: slice) -> Tensor:
        return self.moments[:, :, block, block]

    def _step(self, known: Tensor, off: Tensor, block: slice, steps: Tensor) -> None:
        off[:, :, block] += steps


@dataclass(frozen=True)
class _OfFew(Factor):
    """With the inputs X at the positions, (G, K, B, N)."""

    inputs: Tensor
    ordered: Tensor
    """the same in order"""
    toward: Tensor
    """(G, K, B, N), in order: what positions that columns behind a block have put off pull at it"""
    inverse: Tensor
    """(G, K, N, N), of X' X + r I, times r"""
    ridge: Tensor
    """r, (G, K, 1, 1)"""

    @staticmethod
    def of_few(moments: Few, damping: float | Tensor) -> _OfFew:
        """See `Factor.of`."""
        plain = moments.diagonal
        added = ridge(plain, damping)
        order = plain.argsort(2, descending=True).flip(2)
        ordered = moments.inputs.gather(2, order.unsqueeze(3).expand_as(moments.inputs))
        by = added[:, :, :1].unsqueeze(3)
        built = _built(ordered, by) or _built(ordered.cpu().double(), by.cpu().double())
        assert built is not None
        near, toward, inverse = built
        excess = added - ridge(plain, DAMPINGS[0])
        near, toward, inverse = [each.to(ordered) for each in near], toward.to(ordered), inverse.to(ordered)
        return _OfFew(plain + added, excess, order, near, moments.inputs, ordered, toward, inverse, by)

    def times(self, columns: Tensor) -> Tensor:
        return (self.inputs @ (self.inputs.mT @ columns)).addcmul_(self.ridge, columns)

    def _toward(self, lost: Tensor) -> Tensor:
        return (lost @ self.inverse / self.ridge) @ self.inputs.mT

    def _nothing(self, columns: Tensor) -> Tensor:
        return columns.new_zeros(*columns.shape[:2], self.inputs.shape[3], columns.shape[3])

    def _pull(self, known: Tensor, block: slice) -> Tensor:
        return self.toward[:, :, block] @ known

    def _put(self, known: Tensor, block: slice, off: Tensor) -> None:
        known += self.ordered[:, :, block].mT @ off

    def _seen(self, off: Tensor) -> Tensor:
        return self.inputs.mT @ off

    def _slope(self, known: Tensor, off: Tensor, block: slice) -> Tensor:
        return (self.inputs[:, :, block] @ known).addcmul_(self.ridge, off[:, :, block])

    def _block(self, block: slice) -> Tensor:
        return self.inputs[:, :, block] @ self.inputs[:, :, block].mT

    def _step(self, known: Tensor, off: Tensor, block: slice, steps: Tensor) -> None:
        known += self.inputs[:, :, block].mT @ steps


def _built(ordered: Tensor, by: Tensor) -> tuple[list[Tensor], Tensor, Tensor] | None:
    """`near`, `toward` and `inverse` of `_OfFew`; None where these floats are not enough."""
    count, toward, near = ordered.shape[3], torch.empty_like(ordered), []
    inverse = torch.eye(count, dtype=ordered.dtype, device=ordered.device).repeat(*ordered.shape[:2], 1, 1)
    for block in _blocks(ordered.shape[2]):
        part = ordered[:, :, block]
        beside = part @ inverse
        square = beside @ part.mT
        square.diagonal(dim1=2, dim2=3).add_(by.squeeze(3))
        lower, failed = torch.linalg.cholesky_ex(square)
        if bool(failed.any()):
            return None
        its = torch.linalg.solve_triangular(lower, beside, upper=False)
        near.append(lower)
        toward[:, :, block] = its
        inverse.flatten(0, 1).baddbmm_(its.flatten(0, 1).mT, its.flatten(0, 1), alpha=-1)
    return near, toward, inverse


def _blocks(count: int, size: int = _COLUMNS) -> list[slice]:
    """Of columns, the last of them whole."""
    stops = range(count, 0, -size)
    return [slice(max(stop - size, 0), stop) for stop in reversed(stops)]


def _reordered(moments: Tensor, order: Tensor) -> Tensor:
    """Moments (G, K, B, B) of the inputs in the order (G, K, B)."""
    if moments.shape[3] < _LARGE:
        ordered = moments.gather(2, order.unsqueeze(3).expand_as(moments))
        return ordered.gather(3, order.unsqueeze(2).expand_as(moments))
    ordered = torch.empty_like(moments)  # whole rows are taken faster, and columns are rows of what is symmetric
    for its, whole, taken in zip(*(each.flatten(0, 1) for each in (order, moments, ordered)), strict=True):
        torch.index_select(whole.index_select(0, its).T.contiguous(), 0, its, out=taken)
    return ordered


def _times(columns: Tensor, scale: Tensor) -> Tensor:
    """Columns (G, K, B, R), contiguous, as many times as there are scales (G, n R) for them."""
    return columns.repeat(1, 1, 1, scale.shape[1] // columns.shape[3])


def ridge(diagonal: Tensor, damping: float | Tensor) -> Tensor:
    """What damping adds to the diagonal, (G, K, B), of each group by itself; to inputs that are all zero a trace."""
    kept = diagonal.clamp_min(0)  # what float32 has lost may make it less
    mean = kept.mean(2, keepdim=True)
    return (damping * mean).clamp_min(_TRACE) + (kept - diagonal)
