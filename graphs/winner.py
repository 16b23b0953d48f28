"""The winner of a search, chosen among the best by what no candidate was bred on.

Fitness is what the search climbed, so that the first of many lies above its true worth. The best few are measured
again on calibration draws and search images of which the search saw none, paired image by image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from graphs.population import ranked
from graphs.state import Candidate
from tap_eval.measuring.accuracy import Measurement
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.race import apart, contributions, image_sets
from tap_eval.proxies.fitness import FitnessWeights

FINALISTS = 5


class Finalist(BaseModel):
    """What one of the best few came to."""

    model_config = ConfigDict(frozen=True)
    name: str
    fitness: float
    """by which the search ranked it"""
    worth: float
    """the mean over networks, draws and images"""
    top1: float
    kl: float
    """nats; both likewise"""
    behind: float
    """by how much its fitness is then below the winner's; below 0 where it is above, by less than can be told"""
    error: float
    """one standard error of that, over images"""


def finalists(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best that were measured on all images."""
    return [candidate for candidate in ranked(candidates) if not candidate.dropped][:FINALISTS]


def choose(candidates: Sequence[Candidate], benches: Sequence[Bench], weights: FitnessWeights) -> list[Finalist]:
    """The winner, then the others from the fittest to the least fit; the candidates are whole, and the fittest first.

    Each is measured, as the network that is kept, on the images that candidates are not compared on, under every draw
    of calibration images but the first, which the search used, or under that where there is no other; that is the
    worth in its fitness now, `exp(-KL)` where the search measured none. The fittest before wins unless another is
    ahead of it by more than a standard error.
    """
    measured: list[list[list[Measurement]]] = [[] for _ in candidates]
    for place, bench in enumerate(benches):
        allocations = [candidate.allocations[place].allocation() for candidate in candidates]
        draws = range(len(bench.splits.calibrations))[1:] or range(1)
        if bench.task.finish:
            bench.finish(allocations, draws)
        for of, allocation in zip(measured, allocations, strict=True):
            of.append([bench.held_out(allocation, draw) for draw in draws])
    images = [
        [np.mean([contributions(each, weights.worth) for each in draws], axis=0) for draws in of] for of in measured
    ]
    sets, share = image_sets([bench.splits.search for bench in benches]), weights.share
    worths = [_mean([float(each.mean()) for each in of]) for of in images]
    anew = [
        candidate.value - weights.worth_term(candidate.top1, candidate.kl, candidate.foretelling) + share * worth
        for candidate, worth in zip(candidates, worths, strict=True)
    ]
    most = max(range(len(candidates)), key=lambda place: anew[place])
    if anew[most] - anew[0] <= share * _standard_error(images[most], images[0], sets):
        most = 0
    found = [
        Finalist(
            name=candidate.name,
            fitness=candidate.value,
            worth=worth,
            top1=_mean([each.accuracy.top1 for draws in of for each in draws]),
            kl=_mean([each.mean_kl for draws in of for each in draws]),
            behind=anew[most] - fitness,
            error=share * _standard_error(images[most], seen, sets),
        )
        for candidate, worth, fitness, of, seen in zip(candidates, worths, anew, measured, images, strict=True)
    ]
    return [found[most], *sorted((each for each in found if each is not found[most]), key=lambda each: each.behind)]


def _standard_error(one: Sequence[np.ndarray], other: Sequence[np.ndarray], sets: Sequence[int]) -> float:
    """Of the mean over networks of the mean difference of images, each (N,); see `apart`."""
    return math.sqrt(sum(float(each.var()) / len(each) for each in apart(one, other, sets)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
