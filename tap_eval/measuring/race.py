"""A race: entrants are compared on growing, shared parts of the images, and the hopeless are dropped.

After each stage an entrant is dropped when as many others as are wanted are better than it, by
a paired test on the images seen so far. It is a one-sided z-test of the mean difference with
the correction for a finite population, since the images are drawn without replacement from
those that a full measurement would count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import norm

_LEAST_IMAGES, _LEAST_DIFFERENCES = 100, 8
Correct = list[np.ndarray]
"""Which images were classified correctly, bool, one array a network."""


@dataclass
class Entrant:
    """A candidate for the best places; `offset` is what its fitness is without the accuracy."""

    offset: float
    seen: list[Correct] = field(default_factory=list)
    """what each stage showed"""
    dropped: bool = False

    def correct(self, stages: int | None = None) -> Correct:
        """Of the first `stages` stages, or of all that were run."""
        return [np.concatenate(parts) for parts in zip(*self.seen[:stages], strict=True)]

    def top1(self) -> list[float]:
        """One a network, on the images seen."""
        return [float(each.mean()) for each in self.correct()]


def race(
    entrants: Sequence[Entrant],
    rivals: Sequence[Entrant],
    measure: Callable[[Sequence[int], int], Sequence[Correct]],
    sizes: Sequence[Sequence[int]],
    keep: int,
    error: float,
    weight: float,
) -> None:
    """Runs the entrants to the end, or until they are dropped.

    `rivals` have run all stages. `measure(which, stage)` is given the indices of entrants.
    `sizes` are the images of each stage, one number a network. An entrant is dropped when
    `keep` others are better; `error` bounds the probability of dropping one that belongs to the
    best `keep`, over all stages and comparisons (Bonferroni). `weight` is that of accuracy in
    fitness. With an error of 0 nobody is dropped.
    """
    comparisons = (len(sizes) - 1) * max(len(entrants) + len(rivals) - keep, 1)
    certain = float(norm.isf(error / comparisons))
    for stage in range(len(sizes)):
        running = [index for index, entrant in enumerate(entrants) if not entrant.dropped]
        for index, correct in zip(running, measure(running, stage), strict=True):
            entrants[index].seen.append(correct)
        seen, total = np.sum(sizes[: stage + 1], axis=0), np.sum(sizes, axis=0)
        if stage + 1 == len(sizes) or len(running) + len(rivals) <= keep or sum(seen) < _LEAST_IMAGES:
            continue
        field_ = [*rivals, *(entrants[index] for index in running)]
        beaten = [
            sum(_lead(other, entrants[index], stage + 1, seen, total, weight) > certain for other in field_)
            for index in running
        ]
        for index, better in zip(running, beaten, strict=True):
            entrants[index].dropped = bool(better >= keep)


def top1(entrant: Entrant, finished: Sequence[Entrant]) -> list[float]:
    """Accuracy on all images, one a network: measured, or for the dropped estimated from the images seen.

    The estimate takes out how much easier or harder those images were for the finished.
    """
    seen = entrant.top1()
    if not entrant.dropped or not finished:
        return seen
    part = np.mean([[each.mean() for each in other.correct(len(entrant.seen))] for other in finished], axis=0)
    whole = np.mean([other.top1() for other in finished], axis=0)
    return [min(max(float(value), 0.0), 1.0) for value in np.array(seen) + whole - part]


def _lead(other: Entrant, entrant: Entrant, stages: int, seen: np.ndarray, total: np.ndarray, weight: float) -> float:
    """How far `other` is ahead in fitness, in standard errors; the mean over networks is one of independent means."""
    if other is entrant:
        return -math.inf
    differences = [
        better.astype(float) - worse
        for better, worse in zip(other.correct(stages), entrant.correct(stages), strict=True)
    ]
    if sum(np.count_nonzero(each) for each in differences) < _LEAST_DIFFERENCES:
        return -math.inf  # the normal approximation would be bold
    lead = other.offset - entrant.offset + weight * float(np.mean([each.mean() for each in differences]))
    variances = [
        max(each.var(), 1 / len(each)) / len(each) * (1 - some / all_)
        for each, some, all_ in zip(differences, seen, total, strict=True)
    ]
    return lead / float(weight * math.sqrt(sum(variances)) / len(variances) + 1e-12)
