"""How a search went, in numbers: by these the controllers of templates are compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from graphs.state import Candidate
from tap_eval.proxies.proxy import Failure


class Proposal(NamedTuple):
    """One of a search, in the order of proposal."""

    generation: int
    fitness: float | None
    """None of one that died"""
    parent: float | None
    """the fitness of its better parent, None of one that has none"""


def course(candidates: Sequence[Candidate]) -> list[Proposal]:
    """The proposals of a search; `candidates` are all of it, in their order."""
    values = {each.name: each.value for each in candidates}
    found = []
    for each in candidates:
        parent = max((values[name] for name in each.parents), default=None)
        found.append(Proposal(each.generation, each.fitness, parent))
    return found


def best(proposals: Sequence[Proposal]) -> float:
    """The greatest fitness; minus infinity where none lives."""
    return max((each.fitness for each in proposals if each.fitness is not None), default=-math.inf)


def gain(proposals: Sequence[Proposal]) -> float | None:
    """What offspring have more than their better parents, in the mean; None where none lives."""
    gains = _gains(proposals)
    return statistics.mean(gains) if gains else None


def gained(proposals: Sequence[Proposal]) -> float | None:
    """The share of offspring that have more than their better parents; None where none lives."""
    gains = _gains(proposals)
    return statistics.mean(each > 0 for each in gains) if gains else None


def _gains(proposals: Sequence[Proposal]) -> list[float]:
    return [each.fitness - each.parent for each in proposals if each.fitness is not None and each.parent is not None]


def until(proposals: Sequence[Proposal], goal: float) -> int:
    """How many proposals it took to a fitness of `goal`; all of them where none has it."""
    reached = (place for place, each in enumerate(proposals, 1) if each.fitness is not None and each.fitness >= goal)
    return next(reached, len(proposals))


def within(proposals: Sequence[Proposal]) -> float | None:
    """The standard deviation of fitness in a generation, in the mean over those that a controller has drawn.

    None where none of them has two that live.
    """
    generations: dict[int, list[float]] = {}
    for each in proposals:
        if each.generation and each.fitness is not None:
            generations.setdefault(each.generation, []).append(each.fitness)
    spreads = [statistics.stdev(its) for its in generations.values() if len(its) > 1]
    return statistics.mean(spreads) if spreads else None


def not_executable(candidates: Sequence[Candidate]) -> dict[int, float]:
    """The share of each generation's proposals whose code does not give what it has to, after its agent's repairs.

    A duplicate runs, and drafts are of the proposals on the way to which they were measured.
    """
    proposals = [each for each in candidates if each.draft_of is None]
    died = {each.name for each in proposals if each.failure not in (None, Failure.DUPLICATE)}
    shares = {}
    for generation in sorted({each.generation for each in proposals}):
        its = [each.name for each in proposals if each.generation == generation]
        shares[generation] = sum(name in died for name in its) / len(its)
    return shares
