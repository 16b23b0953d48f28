"""Statistics of rows of numbers that come in parts, so that no more than a part is held in memory.

A first pass over the parts finds mean and range, a second one what is taken from those.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 256
_AT_ONCE = 2**22
"""numbers that are taken together of rows that are there as a whole"""


class Statistics:
    """Of R rows: feed `first` all parts, then `second` all parts again, each (R, N) with any N."""

    def __init__(self, rows: int) -> None:
        self.count = 0
        """numbers of a row that were taken"""
        self._sum, self._absolute, self._square, self._zeros = (
            torch.zeros(rows, dtype=torch.float64) for _ in range(4)
        )
        self._low, self._high = (torch.full((rows,), sign * torch.inf, dtype=torch.float64) for sign in (1, -1))
        self._second, self._fourth = (torch.zeros(rows, dtype=torch.float64) for _ in range(2))
        self._bins = torch.zeros(rows * BINS, dtype=torch.float64)

    def first(self, part: Tensor) -> None:
        """Takes a part into sums and ranges."""
        low, high = torch.aminmax(part, dim=1)
        self._low, self._high = torch.minimum(self._low, low.double()), torch.maximum(self._high, high.double())
        self.count += part.shape[1]
        self._zeros += (part == 0).sum(1)
        wide = part.double()
        self._sum += wide.sum(1)
        self._absolute += wide.abs().sum(1)
        self._square += wide.square().sum(1)

    def second(self, part: Tensor) -> None:
        """Takes a part into central moments and histograms."""
        centred = part.double() - (self._sum / self.count)[:, None]
        squared = centred.square_()
        self._second += squared.sum(1)
        self._fourth += squared.square_().sum(1)
        low, width = self._low[:, None].float(), (self._high - self._low).clamp_min(1e-30)[:, None].float()
        place = ((part - low) / width).mul_(BINS).int().clamp_(0, BINS - 1)
        place += torch.arange(len(part), dtype=torch.int32)[:, None] * BINS
        self._bins += torch.bincount(place.flatten(), minlength=len(self._bins))

    def values(self) -> dict[str, Tensor]:
        """Each statistic of each row, (R,) float64; entropy in nats over 256 equal bins between least and greatest."""
        variance = self._second / self.count
        share = self._bins.view(-1, BINS) / self.count
        return {
            "l1": self._absolute,
            "l2": self._square.sqrt(),
            "mean": self._sum / self.count,
            "std": variance.sqrt(),
            "absmax": torch.maximum(self._low.abs(), self._high.abs()),
            "kurtosis": self._fourth / self.count / variance.square().clamp_min(1e-24),
            "entropy": -torch.special.xlogy(share, share).sum(1),
            "sparsity": self._zeros / self.count,
            "power": self._square / self.count,
        }


class Spread:
    """Mean and variance of R rows that come in parts, in one pass: feed `take` all parts, each (R, N) with any N."""

    def __init__(self, rows: int) -> None:
        self._count = 0
        self._sum, self._square = (torch.zeros(rows, dtype=torch.float64) for _ in range(2))

    def take(self, part: Tensor) -> None:
        """Takes a part into the sums."""
        wide = part.double()
        self._count += part.shape[1]
        self._sum += wide.sum(1)
        self._square += wide.square_().sum(1)

    def values(self) -> dict[str, Tensor]:
        """`mean` and `variance` of each row, (R,) float64."""
        mean = self._sum / self._count
        return {"mean": mean, "variance": (self._square / self._count - mean.square()).clamp_min(0)}


def statistics(rows: Tensor) -> dict[str, Tensor]:
    """Each statistic of each row of (R, N), as (R,) float64."""
    found = Statistics(len(rows))
    for step in (found.first, found.second):
        for part in rows.split(max(_AT_ONCE // len(rows), 1), dim=1):
            step(part)
    return found.values()
