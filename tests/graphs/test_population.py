"""Who survives, and who becomes a parent."""

from __future__ import annotations

import random
from collections.abc import Sequence

from graphs import population
from graphs.state import Candidate


def candidate(name: str, fitness: float | None, scores: Sequence[float] = ()) -> Candidate:
    """By its name alone it ranks layers in a way of its own."""
    own = scores or random.Random(name).sample(range(20), 20)
    return Candidate(
        name=name,
        generation=0,
        template="mutation",
        parents=[],
        thought="",
        code="",
        fitness=fitness,
        scores=[list(own)],
    )


POOL = [candidate("p000", 0.5), candidate("p001", None), candidate("p002", -0.2), candidate("p003", 0.5)]


def test_the_newer_of_equals_comes_first_and_the_dead_do_not_come() -> None:
    assert population.survivors(POOL, 8) == ["p003", "p000", "p002"]
    assert population.survivors(POOL, 2) == ["p003", "p000"]
    assert population.best(POOL) == "p003"
    assert population.best(POOL[1:2]) is None
    names = ["p999", "p1000", "p1000a"]
    assert population.survivors([candidate(name, 0.5) for name in names], 8) == names[::-1]


def test_the_library_holds_the_top_tenth_and_at_least_four() -> None:
    many = [candidate(f"p{index:03d}", index / 100) for index in range(41)]
    assert population.library(POOL) == ["p003", "p000", "p002"]
    assert len(population.library(many)) == 5
    assert len(population.library(many[:30])) == 4
    assert population.library(POOL[:2]) == ["p000"]


def test_the_library_holds_proxies_that_differ_and_what_is_alike_only_where_places_are_left() -> None:
    layers = list(range(20))
    alike = [
        candidate(f"p{index:03d}", 0.9 - index / 100, [layer * (index + 1) for layer in layers]) for index in range(4)
    ]
    others = [candidate(f"p{index:03d}", 0.5 - index / 100) for index in range(4, 8)]
    assert population.library([*alike, *others]) == ["p000", "p004", "p005", "p006"]
    assert population.library([*alike, *others[:1]]) == ["p000", "p004", "p001", "p002"]


def test_an_offspring_has_its_better_parent_to_beat_and_a_new_proxy_the_median_of_the_library() -> None:
    one, two, three = (candidate(f"p{index}", index / 10) for index in range(3))
    assert population.to_beat([one, three], [two]) == 0.2
    assert population.to_beat([], [one, two, three]) == 0.1


def test_templates_need_parents() -> None:
    assert population.feasible([]) == ["initialization"]
    assert population.feasible(["p000"]) == ["initialization", "mutation"]
    assert population.feasible(["p000", "p001"]) == ["initialization", "mutation", "crossover"]


def test_parents_come_from_the_library_and_differ() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        first, second = population.parents("crossover", ["p003", "p000", "p002"], ["p003", "p000"], rng)
        assert first in ("p003", "p000")
        assert second != first
    assert population.parents("initialization", ["p003"], ["p003"], rng) == []
    assert population.parents("mutation", ["p003"], ["p003"], rng) == ["p003"]
