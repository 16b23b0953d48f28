"""What an agent may see of a search: as the job that it is sent, which is plain JSON, and as its assignment."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any, TypedDict

from agents.assignment import Assignment, Outcome, Parent
from graphs.state import Candidate, SearchState, Template, by_proposal
from prompts.emphases import EMPHASES
from prompts.grammar import expression_of
from tap_eval.proxies.proxy import Failure, Proxy

FAILURES_SHOWN = 3
THOUGHTS_SHOWN = 6
TRIED_SHOWN = 8
"""of what was made of a parent, the latest"""
_JUDGED_SHOWN = 128
"""expressions from whose fitness that of others is foreseen, the latest: the time for it grows with their cube"""
_LONGEST_LINE = 240
"""characters of a thought in a line"""


Records = Mapping[str, Mapping[str, Any]]
"""every `Candidate` by name, as the state has them"""


class Job(TypedDict):
    """What one agent node is sent: its offspring, and the context that it may see; plain JSON."""

    generation: int
    name: str
    template: Template
    parents: list[dict[str, Any]]
    library: list[dict[str, Any]]
    failures: list[str]
    known: dict[str, str]
    tried: list[list[dict[str, Any]]]
    place: int
    siblings: int
    emphasis: str
    notebook: list[str]
    judged: dict[str, float]


def jobs(state: SearchState, seed: int) -> list[Job]:
    """One for each offspring that is planned.

    Siblings, which have the same template and first parent, get different emphases as long as there are some.
    """
    records = state["candidates"]
    known = {
        fingerprint: name
        for name, record in records.items()
        if record["failure"] != Failure.DUPLICATE
        for fingerprint in record["prints"]
    }
    failed = (record for record in reversed(records.values()) if record["failure"] and not record.get("draft_of"))
    failures = [f"{record['failure']}: {record['message']}" for record in islice(failed, FAILURES_SHOWN)][::-1]
    library = [asdict(outcome(name, records)) for name in state["population"][:THOUGHTS_SHOWN]]
    judged = _judged(records)
    made: list[Job] = []
    for entry in state["plan"]:
        alike = [each["name"] for each in state["plan"] if _alike(each) == _alike(entry)]
        place, parents = alike.index(entry["name"]), entry["parents"]
        rng = random.Random(seed_of(seed, "emphasis", state["generation"], *_alike(entry)))
        emphases = rng.sample(list(EMPHASES), len(EMPHASES))
        made.append(
            Job(
                generation=state["generation"],
                name=entry["name"],
                template=entry["template"],
                parents=[state["candidates"][name] for name in parents],
                library=library,
                failures=failures,
                known=known,
                tried=[[asdict(each) for each in tried(name, records)] for name in parents],
                place=place + 1,
                siblings=len(alike),
                emphasis=emphases[place % len(emphases)],
                notebook=state.get("notebook", []),
                judged=judged,
            )
        )
    return made


def assignment(job: Job, seed: int) -> Assignment:
    """What `job` asks of an agent."""
    return Assignment(
        template=job["template"],
        parents=tuple(_parent(Candidate(**record)) for record in job["parents"]),
        library=tuple(Outcome(**record) for record in job["library"]),
        failures=tuple(job["failures"]),
        seed=seed_of(seed, "propose", job["name"]),
        name=job["name"],
        tried=tuple(tuple(Outcome(**record) for record in records) for records in job["tried"]),
        place=job["place"],
        siblings=job["siblings"],
        emphasis=job["emphasis"],
        notebook=tuple(job["notebook"]),
        judged=job["judged"],
    )


def outcomes(state: SearchState) -> list[Outcome]:
    """What became of the generation that has been judged."""
    records = state["candidates"]
    return [outcome(name, records) for name, record in records.items() if record["generation"] == state["generation"]]


def tried(parent: str, records: Records) -> list[Outcome]:
    """The latest that were made of `parent`, in the order of their names."""
    offspring = sorted((name for name, record in records.items() if parent in record["parents"]), key=by_proposal)
    return [outcome(name, records) for name in offspring[-TRIED_SHOWN:]]


def outcome(name: str, records: Records) -> Outcome:
    """What became of a judged candidate."""
    candidate = Candidate(**records[name])
    parents = [Candidate(**records[parent]) for parent in candidate.parents]
    return Outcome(
        name=candidate.name,
        template=candidate.template,
        thought=_line(candidate.thought),
        fitness=candidate.fitness,
        top1=_mean(candidate.top1),
        kl=_mean(candidate.kl),
        kls=candidate.kl if len(candidate.kl) > 1 else [],
        rho=_mean(candidate.rho) or 0.0,
        foretelling=_mean(candidate.foretelling),
        failure=candidate.failure and _line(f"{candidate.failure}: {candidate.message}").rstrip("."),
        parents={each.name: _mean(each.foretelling or each.kl) or 0.0 for each in parents},
        by="foretelling" if any(each.foretelling for each in parents) else "KL",
    )


def seed_of(seed: int, *parts: object) -> int:
    """Of a draw for what `parts` name, in a search with this `seed`."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def _judged(records: Records) -> dict[str, float]:
    """The fitness of the latest expressions, from the oldest on."""
    found: dict[str, float] = {}
    latest = sorted(
        records.values(), key=lambda record: (record["generation"], by_proposal(record["name"])), reverse=True
    )
    for record in latest:
        if record["fitness"] is not None and (expression := expression_of(record["code"])):
            found.setdefault(expression, record["fitness"])
            if len(found) == _JUDGED_SHOWN:
                break
    return dict(reversed(found.items()))


def _alike(entry: Mapping[str, Any]) -> tuple[str, ...]:
    return entry["template"], *entry["parents"][:1]


def _parent(candidate: Candidate) -> Parent:
    return Parent(
        name=candidate.name,
        proxy=Proxy(candidate.thought, candidate.code),
        fitness=candidate.value,
        top1=candidate.top1,
        kl=candidate.kl,
        foretelling=candidate.foretelling,
        counts=candidate.images,
        rho=candidate.rho,
        bits=candidate.bits or [bits.means() for bits in candidate.allocations],
    )


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 1] + "…"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
