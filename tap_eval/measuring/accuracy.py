"""What images say of a network: top-1 accuracy with its interval, and how far its outputs are from full precision."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

_FURTHEST = 1e3
"""nats"""


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `count` images, and the mean KL divergence of the outputs."""

    correct: int
    count: int
    kl: float = 0.0
    """nats, from full precision"""

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


@dataclass(frozen=True, eq=False)
class Measurement:
    """What each of N images says of a network."""

    correct: np.ndarray
    """(N,), bool: whether it is classified correctly"""
    kl: np.ndarray
    """(N,), float32: KL divergence of its outputs from full precision, nats"""

    def __len__(self) -> int:
        return len(self.correct)

    @staticmethod
    def of(logits: Tensor, reference: Tensor, labels: Tensor) -> Measurement:
        """Of the `logits` (N, classes) of N images, beside those in full precision; where one is NaN none is right."""
        kl = divergence(reference, logits).float().numpy()
        return Measurement(((logits.argmax(1) == labels) & ~logits.isnan().any(1)).numpy(), kl)

    @staticmethod
    def joined(parts: Sequence[Measurement]) -> Measurement:
        """Of the images of all parts, in their order."""
        return Measurement(*(np.concatenate([getattr(part, of) for part in parts]) for of in ("correct", "kl")))

    def packed(self) -> dict[str, str]:
        """As JSON: a bit an image in hexadecimal, and a float32 in base64."""
        kl = base64.b64encode(self.kl.astype("<f4").tobytes()).decode()
        return {"correct": np.packbits(self.correct).tobytes().hex(), "kl": kl}

    @staticmethod
    def unpacked(record: Mapping[str, str]) -> Measurement:
        """From what `packed` gave."""
        packed = np.frombuffer(bytes.fromhex(record["correct"]), dtype=np.uint8)
        kl = np.frombuffer(base64.b64decode(record["kl"]), dtype="<f4").astype(np.float32)
        return Measurement(np.unpackbits(packed, count=len(kl)).astype(bool), kl)

    @property
    def mean_kl(self) -> float:
        """Nats."""
        return float(self.kl.mean(dtype=np.float64))

    @property
    def accuracy(self) -> Accuracy:
        """In short."""
        return Accuracy(int(self.correct.sum()), len(self), self.mean_kl)


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """(N,) KL(reference || logits) of each image, nats, float64; both (N, classes), before softmax, on any device.

    At most `_FURTHEST`, which logits get that are not numbers. Classes that the reference excludes add nothing.
    """
    expected, got = (torch.log_softmax(values.cpu().double(), dim=1) for values in (reference, logits))
    terms = torch.where(expected == -torch.inf, 0.0, expected.exp() * (expected - got))
    return terms.sum(1).nan_to_num(nan=_FURTHEST).clamp(0, _FURTHEST)


def mean_kl(reference: Tensor, logits: Tensor) -> float:
    """The mean over images, nats."""
    return float(divergence(reference, logits).mean())
