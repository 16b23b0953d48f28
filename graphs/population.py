"""Who survives, whom the agents are shown, and who becomes a parent."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence

from graphs.state import Candidate, Template, by_proposal
from tap_eval.proxies.fitness import rank_correlation

LEAST = 4
"""places in the library, so that more than two proxies have offspring"""
ALIKE = 0.98
"""rank correlation of scores from which on two proxies are one idea"""


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The living from best to worst; of equals, the newer comes first."""
    living = [candidate for candidate in candidates if candidate.fitness is not None]
    return sorted(living, key=lambda candidate: (candidate.value, by_proposal(candidate.name)), reverse=True)


def survivors(candidates: Iterable[Candidate], size: int) -> list[str]:
    """Names of the best `size`: the next population."""
    return [candidate.name for candidate in ranked(candidates)[:size]]


def library(candidates: Iterable[Candidate]) -> list[str]:
    """Names of the best that differ: the top tenth, at least four.

    One whose scores rank layers as those of a better one do has no place, unless places are left.
    """
    order = ranked({candidate.name: candidate for candidate in candidates}.values())
    places = max(LEAST, -(-len(order) // 10))
    differing: list[Candidate] = []
    for candidate in order:
        if len(differing) == places:
            break
        if all(_likeness(candidate, other) < ALIKE for other in differing):
            differing.append(candidate)
    alike = [candidate for candidate in order if candidate not in differing]
    return [candidate.name for candidate in [*differing, *alike][:places]]


def _likeness(one: Candidate, other: Candidate) -> float:
    """Rank correlation of their scores, the mean over networks."""
    pairs = list(zip(one.scores, other.scores, strict=True))
    return sum(rank_correlation(*pair) for pair in pairs) / len(pairs)


def to_beat(parents: Sequence[Candidate], library: Sequence[Candidate]) -> float:
    """The fitness over which an offspring's is a gain: of its better parent, or the median of the library."""
    if parents:
        return max(parent.value for parent in parents)
    return statistics.median(candidate.value for candidate in library) if library else 0.0


def best(candidates: Iterable[Candidate]) -> str | None:
    """Name of the best of all generations, of those that were measured on all images."""
    return next((candidate.name for candidate in ranked(candidates) if not candidate.dropped), None)


def feasible(population: Sequence[str]) -> list[Template]:
    """The templates for which the population has enough parents."""
    templates: tuple[Template, ...] = ("initialization", "mutation", "crossover")
    return [template for template, needed in zip(templates, (0, 1, 2), strict=True) if len(population) >= needed]


def parents(template: Template, population: Sequence[str], library: Sequence[str], rng: random.Random) -> list[str]:
    """Parents for one offspring: one from the library, and for crossover another from the population."""
    if template == "initialization":
        return []
    first = rng.choice(list(library))
    if template == "mutation":
        return [first]
    return [first, rng.choice([name for name in population if name != first])]
