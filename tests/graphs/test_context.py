"""What an agent sees of the search so far, and how siblings are told apart."""

from __future__ import annotations

import json
from typing import Any, cast

from graphs.context import Job, assignment, jobs
from graphs.state import Candidate, SearchState, Template
from prompts import grammar
from prompts.emphases import EMPHASES


def candidate(name: str, parents: list[str] | None = None, template: Template = "mutation", **other: Any) -> Candidate:
    figures = {} if "failure" in other else {"kl": [0.25], "top1": [0.75], "fitness": 0.5, "rho": [0.5], "images": [8]}
    figures |= {"bits": [[4.0, 2.0]]} if figures else {}
    whole: dict[str, Any] = {"thought": f"Thought of {name}.\nMore.", "code": f"# {name}", **figures, **other}
    return Candidate(name=name, generation=0, template=template, parents=parents or [], **whole)


def planned(plan: list[tuple[Template, list[str]]], *candidates: Candidate, generation: int = 1) -> SearchState:
    entries = [
        {"name": f"p{len(candidates) + place:03d}", "template": template, "parents": parents}
        for place, (template, parents) in enumerate(plan)
    ]
    living = [each.name for each in candidates if each.failure is None]
    state: dict[str, Any] = {
        "generation": generation, "plan": entries, "population": living,
        "candidates": {each.name: each.model_dump(mode="json") for each in candidates},
    }  # fmt: skip
    return cast("SearchState", state)


def question(job: Job) -> str:
    return assignment(job, 0).question(["digits"])


CHANGED = [
    candidate("p000", kl=[0.5]),
    candidate("p001", template="initialization"),
    candidate("p002", ["p000"], kl=[0.1875, 0.0625], fitness=0.75),
    candidate("p003", ["p000", "p001"], "crossover", failure="error", message="line 2: no."),
    candidate("p004", ["p001"]),
]


def test_a_parent_is_shown_with_what_was_made_of_it_and_what_came_of_that() -> None:
    (job,) = jobs(planned([("mutation", ["p000"])], *CHANGED), 0)
    _, asked = question(job).split("What was made of p000 before:\n")
    lines = [line for line in asked.split("\n\n")[0].splitlines() if line]
    assert lines == [
        "- p002 (mutation of p000, KL 0.5000): KL 0.1250 (0.1875, 0.0625), accuracy 0.7500, rho 0.500, fitness 0.7500. "
        "Thought of p002. More.",
        "- p003 (crossover of p000, KL 0.5000 and p001, KL 0.2500): died, error: line 2: no. Thought of p003. More.",
    ]


def test_initialization_sees_the_thoughts_of_the_best_with_their_figures() -> None:
    (job,) = jobs(planned([("initialization", [])], *CHANGED), 0)
    text = question(job)
    assert "- p001 (initialization): KL 0.2500, accuracy 0.7500, rho 0.500, fitness 0.5000. Thought of p001." in text
    assert "differs in its idea from those that exist" in text
    assert "- error: line 2: no." in text


def test_what_is_made_of_a_parent_is_bounded() -> None:
    many = [candidate("p000"), *(candidate(f"p{place:03d}", ["p000"], thought="x" * 4000) for place in range(1, 40))]
    (job,) = jobs(planned([("mutation", ["p000"])], *many), 0)
    assert [each["name"] for each in job["tried"][0]] == [f"p{place:03d}" for place in range(32, 40)]
    assert len(question(job)) < 6000


def test_siblings_are_told_apart_and_a_generation_shares_its_beginning() -> None:
    plan: list[tuple[Template, list[str]]] = [
        ("mutation", ["p000"]), ("mutation", ["p001"]), ("mutation", ["p000"]), ("crossover", ["p000", "p001"]),
    ]  # fmt: skip
    made = jobs(planned(plan, *CHANGED), 7)
    assert [(job["place"], job["siblings"]) for job in made] == [(1, 2), (1, 1), (2, 2), (1, 1)]
    assert made[0]["emphasis"] != made[2]["emphasis"]
    texts = [question(job) for job in made]
    assert "You are number 2 of 2 agents that are asked this" in texts[2]
    assert "at the same time" not in texts[1]
    assert EMPHASES[made[3]["emphasis"]] in texts[3]
    assert len({text.split("# What you are asked for")[0] for text in texts}) == 1
    assert jobs(planned(plan, *CHANGED), 7) == made
    assert json.loads(json.dumps(made)) == made


def test_a_small_model_is_told_the_fitness_of_each_expression() -> None:
    _, code = grammar.code_of('{"thought": "T.", "expression": "depth**2 * channel.weight_std"}')
    expressions = [candidate("p000", code=code, fitness=0.75), candidate("p001", code=code, failure="duplicate")]
    (job,) = jobs(planned([("mutation", ["p000"])], *expressions, *CHANGED[2:]), 0)
    assert json.loads(json.dumps(job)) == job
    assert assignment(job, 0).judged == {"depth**2 * channel.weight_std": 0.75}


def test_a_first_generation_takes_every_emphasis() -> None:
    made = jobs(planned([("initialization", [])] * 8, generation=0), 0)
    assert {job["emphasis"] for job in made} == set(EMPHASES)
    assert "The best so far" not in question(made[0])
