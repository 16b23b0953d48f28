"""What is asked of whatever measures a network: images to be seen by a network with given bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from tap_eval.quantization.quantizer import Allocation

SplitName = Literal["search", "test"]
_AT_ONCE = 5000
"""images whose outputs are held together, but for those in full precision"""


@dataclass(frozen=True)
class Job:
    """Some images of a split, to be seen with the bits of `allocation`, or in full precision."""

    allocation: Allocation | None
    split: SplitName
    draw: int
    """of the calibration images"""
    rows: np.ndarray
    integers: bool
    """multiplied as such, or else simulated"""
    finished: bool = False
    """rounded once more for this allocation"""
    sums: bool = False
    """travel between layers in integers"""


def pieces(job: Job, size: int, workers: int) -> list[Job]:
    """The job in pieces for so many workers, cut between batches of `size`: the same floats in any number of them."""
    batches = [job.rows[start : start + size] for start in range(0, len(job.rows), size)]
    least = math.ceil(len(job.rows) / _AT_ONCE)
    count = min(max(workers, least, 1), len(batches))
    cut = np.array_split(np.arange(len(batches)), count)
    return [replace(job, rows=np.concatenate([batches[place] for place in piece])) for piece in cut]


class Measures(Protocol):
    """Whatever measures: this process, or several machines."""

    @property
    def workers(self) -> int:
        """Jobs that run side by side."""
        ...

    @property
    def unfit(self) -> str | None:
        """Why allocations are measured on the simulated path, or None where integers are multiplied."""
        ...

    @property
    def sums(self) -> bool:
        """Whether what travels between layers is in integers, as `tap_eval.quantization.sums` says."""
        ...

    @property
    def notes(self) -> list[str]:
        """How measuring differs from what is usual, each after "is measured"."""
        ...

    def logits(self, job: Job) -> Tensor:
        """The outputs for the job's images, (N, classes), float32, before softmax, on the CPU."""
        ...

    def layer_errors(self, bits: int, count: int) -> list[float]:
        """Mean KL divergence (nats) a layer with `bits` of its own, on the first `count` search images."""
        ...
