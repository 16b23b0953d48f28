"""A race: entrants are compared on growing, shared parts of the images, and the hopeless are dropped.

After each stage an entrant is dropped when as many others as are wanted are better than it, by
a paired test on the images seen so far. It is a one-sided t-test of the mean difference with
the correction for a finite population, since the images are drawn without replacement from
those that a full measurement would count. Divergences of outputs from full precision tell
entrants apart on far fewer images than right and wrong answers do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import t

from tap_eval.images.images import Images
from tap_eval.measuring.accuracy import Measurement
from tap_eval.proxies.fitness import Worth

_LEAST_DIFFERENCES, _LEAST_NATS = 8, 1e-9
_LEAST_IMAGES: dict[Worth, int] = {"accuracy": 100, "kl": 30}
"""before which nobody is dropped: means of right and wrong come close to a normal distribution on more images"""
Seen = list[Measurement]
"""What images say of an entrant, one measurement a network."""


@dataclass
class Entrant:
    """A candidate for the best places; `offset` is what its fitness is without the worth of its allocations."""

    offset: float
    seen: list[Seen] = field(default_factory=list)
    """what each stage showed"""
    dropped: bool = False

    def so_far(self, stages: int | None = None) -> Seen:
        """Of the first `stages` stages together, or of all that were run."""
        return [Measurement.joined(parts) for parts in zip(*self.seen[:stages], strict=True)]


def race(
    entrants: Sequence[Entrant],
    rivals: Sequence[Entrant],
    measure: Callable[[Sequence[int], int], Sequence[Seen]],
    sizes: Sequence[Sequence[int]],
    sets: Sequence[int],
    keep: int,
    error: float,
    weight: float,
    worth: Worth,
) -> None:
    """Runs the entrants to the end, or until they are dropped.

    `rivals` have run all stages. `measure(which, stage)` is given the indices of entrants.
    `sizes` are the images of each stage, one number a network; networks of one number in `sets` see the same images,
    and are no independent witnesses. An entrant is dropped when
    `keep` others are better; `error` bounds the probability of dropping one that belongs to the
    best `keep`, over all stages and comparisons (Bonferroni). `weight` is that of `worth` in
    fitness. With an error of 0 nobody is dropped.
    """
    comparisons = (len(sizes) - 1) * max(len(entrants) + len(rivals) - keep, 1)
    for stage in range(len(sizes)):
        running = [index for index, entrant in enumerate(entrants) if not entrant.dropped]
        for index, seen in zip(running, measure(running, stage), strict=True):
            entrants[index].seen.append(seen)
        shown, total = np.sum(sizes[: stage + 1], axis=0), np.sum(sizes, axis=0)
        images = sum(shown[sets.index(each)] for each in set(sets))
        if stage + 1 == len(sizes) or len(running) + len(rivals) <= keep or images < _LEAST_IMAGES[worth]:
            continue
        certain = float(t.isf(error / comparisons, images - 1))
        share = [float(shown[place] / total[place]) for place in map(sets.index, sorted(set(sets)))]
        field_ = [(entrant, entrant.so_far(stage + 1)) for entrant in [*rivals, *(entrants[i] for i in running)]]
        for entrant, its in field_[len(rivals) :]:
            leads = ((other.offset - entrant.offset, their) for other, their in field_ if other is not entrant)
            better = sum(_lead(offset, their, its, sets, share, weight, worth) > certain for offset, their in leads)
            entrant.dropped = bool(better >= keep)


def estimated(entrant: Entrant, finished: Sequence[Entrant]) -> tuple[list[float], list[float]]:
    """Accuracy and mean divergence (nats) on all images, one each a network.

    Measured, or for the dropped estimated from the images seen: what is estimated takes out how much easier or
    harder those images were for the finished.
    """
    seen = entrant.so_far()
    top1, kl = [each.accuracy.top1 for each in seen], [each.mean_kl for each in seen]
    if not entrant.dropped or not finished:
        return top1, kl
    parts = [other.so_far(len(entrant.seen)) for other in finished]
    wholes = [other.so_far() for other in finished]
    for place in range(len(seen)):
        part, whole = ([each[place] for each in of] for of in (parts, wholes))
        easier = np.mean([each.correct.mean() for each in whole]) - np.mean([each.correct.mean() for each in part])
        top1[place] = min(max(top1[place] + float(easier), 0.0), 1.0)
        kl[place] *= sum(each.mean_kl for each in whole) / max(sum(each.mean_kl for each in part), _LEAST_NATS)
    return top1, kl


def _lead(
    offset: float,
    better: Seen,
    worse: Seen,
    sets: Sequence[int],
    share: Sequence[float],
    weight: float,
    worth: Worth,
) -> float:
    """How far `better` is ahead in fitness, in standard errors, with `offset` ahead for the rest of it.

    `share` is what has been seen of each set of images.
    """
    ahead = apart([contributions(each, worth) for each in better], [contributions(each, worth) for each in worse], sets)
    if sum(np.count_nonzero(each) for each in ahead) < _LEAST_DIFFERENCES:
        return -math.inf  # the normal approximation would be bold
    # images that all agree say little where answers are right or wrong
    least = [(sets.count(each) / len(sets)) ** 2 if worth == "accuracy" else 0.0 for each in sorted(set(sets))]
    variance = sum(
        max(float(each.var()), some / len(each)) / len(each) * (1 - part)
        for each, some, part in zip(ahead, least, share, strict=True)
    )
    lead = offset + weight * sum(float(each.mean()) for each in ahead)
    return lead / (weight * math.sqrt(variance) + 1e-12)


def image_sets(images: Sequence[Images]) -> list[int]:
    """A number for the search images of each network, the same for the same images."""
    digests = [each.digest for each in images]
    return [digests.index(digest) for digest in digests]


def apart(one: Sequence[np.ndarray], other: Sequence[np.ndarray], sets: Sequence[int]) -> list[np.ndarray]:
    """By how much images put one ahead of another, whose means add up to the mean over networks of mean differences.

    Both hold a (N,) each network; there is an array for each set of images, which networks of one number in `sets`
    share: what these say of an image is one thing.
    """
    differences = [(its - their) / len(sets) for its, their in zip(one, other, strict=True)]
    return [
        np.sum([each for each, number in zip(differences, sets, strict=True) if number == which], axis=0)
        for which in sorted(set(sets))
    ]


def contributions(seen: Measurement, worth: Worth) -> np.ndarray:
    """(N,), whose mean is the worth, and whose deviations are those that an image brings to it, to first order.

    Worth is `exp(-KL)` unless it is accuracy.
    """
    if worth == "accuracy":
        return seen.correct.astype(float)
    reached = math.exp(-seen.mean_kl)
    found: np.ndarray = reached * (1 - (seen.kl.astype(float) - seen.mean_kl))
    return found
