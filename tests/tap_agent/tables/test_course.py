"""What tells how a search went, by hand."""

from __future__ import annotations

import pytest

from graphs.state import Candidate
from tap_agent.tables import course


def proposal(name: str, generation: int, fitness: float | None, *parents: str, failure: str | None = None) -> Candidate:
    draft = name[:-1] if name.endswith("a") else None
    return Candidate(
        name=name, generation=generation, template="mutation", parents=list(parents), thought="", code="",
        fitness=fitness, failure=failure, draft_of=draft,
    )  # fmt: skip


def test_a_course_in_numbers() -> None:
    candidates = [
        proposal("p000", 0, 0.5),
        proposal("p001", 0, 0.3),
        proposal("p002", 0, None, failure="error"),
        proposal("p003", 1, 0.7, "p000", "p001"),
        proposal("p004", 1, 0.4, "p000"),
        proposal("p005", 1, None, "p000", failure="duplicate"),
        proposal("p006", 1, None, "p000", failure="timeout"),
        proposal("p006a", 1, 0.5, "p000"),
    ]
    its = course.course(candidates)
    assert [each.name for each in course.proposals(candidates)] == [f"p{place:03d}" for place in range(7)]
    assert its[3] == (1, 0.7, 0.5)
    assert its[6] == (1, 0.5, 0.5)  # of its draft
    assert course.best(its) == 0.7
    assert course.gain(its) == pytest.approx((0.2 - 0.1 + 0.0) / 3)
    assert course.gained(its) == pytest.approx(1 / 3)
    assert course.within(its) == pytest.approx(0.1527525)
    assert [course.until(its, goal, 12) for goal in (0.5, 0.6, 0.8)] == [1, 4, 12]
    assert course.not_executable(candidates) == {0: pytest.approx(1 / 3), 1: 0.25}
    alone = course.course([proposal("p000", 0, None, failure="error")])
    assert (course.gain(alone), course.gained(alone), course.within(alone)) == (None, None, None)
