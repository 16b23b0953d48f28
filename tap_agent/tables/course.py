"""How a search went, in numbers: by these the controllers of templates are compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from graphs.state import Candidate
from tap_eval.proxies.proxy import Failure


class Proposal(NamedTuple):
    """One of a search, in the order of proposal, with the drafts that its agent measured on the way to it."""

    generation: int
    fitness: float | None
    """the best of it and its drafts, None where all died"""
    parent: float | None
    """the fitness of its better parent, None of one that has none"""


def course(candidates: Sequence[Candidate]) -> list[Proposal]:
    """The proposals of a search; `candidates` are all of it, in their order."""
    values = {each.name: each.value for each in candidates}
    fitness: dict[str, list[float]] = {}
    for each in candidates:
        if each.fitness is not None:
            fitness.setdefault(each.draft_of or each.name, []).append(each.fitness)
    found = []
    for each in proposals(candidates):
        parent = max((values[name] for name in each.parents), default=None)
        found.append(Proposal(each.generation, max(fitness.get(each.name, ()), default=None), parent))
    return found


def proposals(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that are no drafts."""
    return [each for each in candidates if each.draft_of is None]


def best(its: Sequence[Proposal]) -> float:
    """The greatest fitness; minus infinity where none lives."""
    return max((each.fitness for each in its if each.fitness is not None), default=-math.inf)


def gain(its: Sequence[Proposal]) -> float | None:
    """What offspring have more than their better parents, in the mean; None where none lives."""
    gains = _gains(its)
    return statistics.mean(gains) if gains else None


def gained(its: Sequence[Proposal]) -> float | None:
    """The share of offspring that have more than their better parents; None where none lives."""
    gains = _gains(its)
    return statistics.mean(each > 0 for each in gains) if gains else None


def _gains(its: Sequence[Proposal]) -> list[float]:
    return [each.fitness - each.parent for each in its if each.fitness is not None and each.parent is not None]


def until(its: Sequence[Proposal], goal: float, planned: int) -> int:
    """How many proposals it took to a fitness of `goal`; all that were `planned` where none has it."""
    reached = (place for place, each in enumerate(its, 1) if each.fitness is not None and each.fitness >= goal)
    return next(reached, planned)


def within(its: Sequence[Proposal]) -> float | None:
    """The standard deviation of fitness in a generation, in the mean over those that a controller has drawn.

    None where none of them has two that live.
    """
    generations: dict[int, list[float]] = {}
    for each in its:
        if each.generation and each.fitness is not None:
            generations.setdefault(each.generation, []).append(each.fitness)
    spreads = [statistics.stdev(fitness) for fitness in generations.values() if len(fitness) > 1]
    return statistics.mean(spreads) if spreads else None


def not_executable(candidates: Sequence[Candidate]) -> dict[int, float]:
    """The share of each generation's proposals whose code does not give what it has to, after its agent's repairs.

    A duplicate runs, and drafts are of the proposals on the way to which they were measured.
    """
    made = proposals(candidates)
    died = {each.name for each in made if each.failure not in (None, Failure.DUPLICATE)}
    shares = {}
    for generation in sorted({each.generation for each in made}):
        its = [each.name for each in made if each.generation == generation]
        shares[generation] = sum(name in died for name in its) / len(its)
    return shares
