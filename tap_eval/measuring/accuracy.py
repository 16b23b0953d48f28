"""Top-1 accuracy with its count and interval, and the distance between two networks' outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `count` images."""

    correct: int
    count: int

    @property
    def top1(self) -> float:
        """Share in [0, 1]."""
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval (Wilson 1927)."""
        found = binomtest(self.correct, self.count).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.top1:.1f} % ({100 * low:.1f} to {100 * high:.1f}, n = {self.count:,})"


def mean_kl(reference: Tensor, logits: Tensor) -> float:
    """Mean over images of KL(reference || logits) in nats; both (N, classes), before softmax, on any device."""
    expected, got = (torch.log_softmax(values.cpu().double(), dim=1) for values in (reference, logits))
    return float((expected.exp() * (expected - got)).sum(1).mean())
