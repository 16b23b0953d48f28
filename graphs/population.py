"""Who survives, whom the agents are shown, and who becomes a parent."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from graphs.state import Candidate, Template


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The living from best to worst; of equals, the newer comes first."""
    living = [candidate for candidate in candidates if candidate.fitness is not None]
    return sorted(living, key=lambda candidate: (candidate.value, candidate.name), reverse=True)


def survivors(candidates: Iterable[Candidate], size: int) -> list[str]:
    """Names of the best `size`: the next population."""
    return [candidate.name for candidate in ranked(candidates)[:size]]


def library(candidates: Iterable[Candidate]) -> list[str]:
    """Names of the top tenth, at least two where there are two, of those that were measured on all images."""
    order = ranked(candidates)
    finished = list(dict.fromkeys(candidate.name for candidate in order if not candidate.dropped))
    return finished[: library_size(len(order))]


def library_size(candidates: int) -> int:
    """Places in the library for the best of so many."""
    return max(2, -(-candidates // 10))


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
