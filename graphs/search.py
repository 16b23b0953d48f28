"""The search: prepare -> seed -> agents -> judge -> select -> agents ... -> report.

Each offspring of a generation is one `Send` to the agent of its template; they run in
parallel and meet in the judge. Every random draw comes from a generator that is seeded by
what it draws for, so that a resumed run gives what it would have given.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypedDict, cast

from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from agents.proposer import Assignment, Attempt, Parent, Proposer
from graphs import controller, population
from graphs.judge import Judge
from graphs.state import TEMPLATES, Bits, Candidate, Generation, SearchState, Template
from tap_eval.bench import Bench
from tap_eval.fitness import FitnessWeights
from tap_eval.proxy import Failure, Proxy, Rejection
from tools.evaluation import Known, tree_print

_LATER = {"prints", "rho", "top1", "images", "dropped", "fitness"}
"""what the event of a proposal leaves to that of its judgement, or to the result"""
FAILURES_SHOWN = 3
THOUGHTS_SHOWN = 6


@dataclass(frozen=True)
class SearchSettings:
    """What steers a search."""

    population: int = 8
    generations: int = 5
    controller: controller.Controller = "ratio"
    fitness: FitnessWeights = FitnessWeights()
    racing: float = 0.0
    """see `graphs.judge.Judge`"""
    seed: int = 0


class Job(TypedDict):
    """What one agent node is sent: its offspring, and the context that it may see; plain JSON."""

    generation: int
    name: str
    template: Template
    parents: list[dict[str, Any]]
    library: list[str]
    failures: list[str]
    known: dict[str, str]


class Search:
    """The nodes of the graph over the agents and a benchmark set, which `open_proposer` supplies.

    `emit` is given every event as a JSON dict; `finish` is called once with the final state.
    """

    def __init__(
        self,
        open_proposer: Callable[[], Proposer],
        settings: SearchSettings,
        emit: Callable[[dict[str, Any]], None],
        finish: Callable[[SearchState], None],
    ) -> None:
        self._open_proposer = open_proposer
        self.settings = settings
        self.emit = emit
        self.finish = finish

    @cached_property
    def proposer(self) -> Proposer:
        """The agents, opened when they are first needed: a graph can be drawn without a network."""
        return self._open_proposer()

    @cached_property
    def _judge(self) -> Judge:
        return Judge(self.benches, self.settings.fitness, self.settings.racing)

    @property
    def benches(self) -> Sequence[Bench]:
        """The benchmark set."""
        return self.proposer.benches

    def prepare(self, state: SearchState) -> dict[str, Any]:
        """Measures what every fitness needs: the layer errors of each network, once."""
        for bench in self.benches:
            self.emit({"event": "preparing", "network": bench.name, "layers": len(bench.layers)})
            bench.measure(None)
            assert bench.layer_errors
            self.emit({"event": "prepared", "network": bench.name, "notes": bench.notes})
        return {"weights": dict(controller.initial()), "generation": 0, "population": [], "library": [], "best": None}

    def seed(self, state: SearchState) -> dict[str, Any]:
        """The initial population: all from the initialization template."""
        return {"plan": [self._entry(index, "initialization", []) for index in range(self.settings.population)]}

    def select(self, state: SearchState) -> dict[str, Any]:
        """Draws a template and its parents for each offspring of the next generation."""
        generation = state["generation"] + 1
        draw = self._probabilities(state)
        first = len(state["candidates"])
        plan: list[dict[str, Any]] = []
        for index in range(first, first + self.settings.population):
            rng = random.Random(self._seed_of("select", generation, index))
            template = rng.choices(TEMPLATES, [draw[name] for name in TEMPLATES])[0]
            chosen = population.parents(template, state["population"], state["library"], rng)
            plan.append(self._entry(index, template, chosen))
        return {"generation": generation, "plan": plan}

    def fan_out(self, state: SearchState) -> list[Send]:
        """One job an offspring."""
        candidates = {name: Candidate(**record) for name, record in state["candidates"].items()}
        known = {
            fingerprint: candidate.name
            for candidate in candidates.values()
            if candidate.failure != Failure.DUPLICATE
            for fingerprint in candidate.prints
        }
        failures = [f"{c.failure}: {c.message}" for c in candidates.values() if c.failure][-FAILURES_SHOWN:]
        thoughts = [candidates[name].thought for name in state["population"][:THOUGHTS_SHOWN]]
        return [
            Send(
                entry["template"],
                Job(
                    generation=state["generation"],
                    name=entry["name"],
                    template=entry["template"],
                    parents=[state["candidates"][name] for name in entry["parents"]],
                    library=thoughts,
                    failures=failures,
                    known=known,
                ),
            )
            for entry in state["plan"]
        ]

    def offspring(self, job: Job) -> dict[str, Any]:
        """One agent's work: a proposal, scored and allocated. A failure of the candidate is a result."""
        parents = [Candidate(**record) for record in job["parents"]]
        assignment = Assignment(
            template=job["template"],
            parents=tuple(map(self._parent, parents)),
            library=tuple(job["library"]),
            failures=tuple(job["failures"]),
            seed=self._seed_of("propose", job["name"]),
        )
        attempt = self.proposer.propose(assignment, Known(job["known"]))
        record = Candidate(
            name=job["name"],
            generation=job["generation"],
            template=job["template"],
            parents=[parent.name for parent in parents],
            thought=attempt.proxy.thought,
            code=attempt.proxy.code,
            seconds=attempt.seconds,
            tokens=attempt.tokens,
            rounds=attempt.rounds,
        )
        if isinstance(attempt.outcome, Rejection):
            found: dict[str, Any] = {"failure": str(attempt.outcome.failure), "message": attempt.outcome.message}
            found["prints"] = _prints(attempt)
        else:
            found = {
                "scores": attempt.outcome.scores,
                "prints": attempt.outcome.prints,
                "allocations": [Bits.of(allocation) for allocation in attempt.outcome.allocations],
            }
        record = Candidate(**(record.model_dump() | found))
        self.emit(
            {"event": "proposed", **record.model_dump(mode="json", exclude=_LATER)}
            | {"tool_calls": list(attempt.tool_calls)}
        )
        return {"candidates": {record.name: record.model_dump(mode="json")}}

    def judge(self, state: SearchState) -> dict[str, Any]:
        """Fitness of the generation's offspring; then the controller's weights, the library, the population."""
        everyone = {name: Candidate(**record) for name, record in state["candidates"].items()}
        names = [entry["name"] for entry in state["plan"]]
        places = population.library_size(len(state["population"]) + len(names))
        judged = self._judge.judge(names, everyone, state["library"], places)
        everyone |= judged
        pool = [everyone[name] for name in state["population"]] + list(judged.values())
        library = population.library([*pool, *(everyone[name] for name in state["library"])])
        keep = population.survivors(pool, self.settings.population)
        values = [candidate.fitness for candidate in judged.values() if candidate.fitness is not None]
        finished = [candidate.value for candidate in judged.values() if not candidate.dropped and not candidate.failure]
        weights = cast("dict[Template, float]", state["weights"])
        if state["generation"] > 0:
            update = controller.UPDATES[self.settings.controller]
            weights = update(weights, [(entry["template"], judged[entry["name"]].value) for entry in state["plan"]])
        generation = Generation(
            index=state["generation"],
            probabilities=self._probabilities(state),
            offspring=cast("dict[Template, int]", dict(Counter(candidate.template for candidate in judged.values()))),
            failures=dict(Counter(candidate.failure for candidate in judged.values() if candidate.failure)),
            best=max(finished, default=None),
            mean=sum(values) / len(values) if values else None,
            population=keep,
        )
        for candidate in judged.values():
            self.emit(
                {
                    "event": "judged",
                    "name": candidate.name,
                    "generation": candidate.generation,
                    "template": candidate.template,
                    "fitness": candidate.fitness,
                    "rho": candidate.rho,
                    "top1": candidate.top1,
                    "images": candidate.images,
                    "dropped": candidate.dropped,
                    "failure": candidate.failure,
                    "message": candidate.message,
                    "seconds": candidate.seconds,
                    "tokens": candidate.tokens,
                }
            )
        self.emit({"event": "generation", **generation.model_dump(mode="json"), "weights": dict(weights)})
        return {
            "candidates": {name: candidate.model_dump(mode="json") for name, candidate in judged.items()},
            "weights": dict(weights),
            "population": keep,
            "library": library,
            "best": population.best(everyone.values()),
            "generations": [generation.model_dump(mode="json")],
        }

    def again(self, state: SearchState) -> Literal["select", "report"]:
        """Whether there is another generation to come."""
        return "select" if state["generation"] < self.settings.generations else "report"

    def report(self, state: SearchState) -> dict[str, Any]:
        """Hands the final state over; the test split is read here and nowhere else."""
        self.finish(state)
        return {}

    def graph(self) -> StateGraph[SearchState]:
        """The state machine, not compiled: the caller brings the checkpointer."""
        graph = StateGraph(SearchState)
        graph.add_node("prepare", self.prepare)
        graph.add_node("seed", self.seed)
        graph.add_node("select", self.select)
        for template in TEMPLATES:
            graph.add_node(template, RunnableLambda(self.offspring), input_schema=Job)
            graph.add_edge(template, "judge")
        graph.add_node("judge", self.judge)
        graph.add_node("report", self.report)
        graph.add_edge(START, "prepare")
        graph.add_edge("prepare", "seed")
        graph.add_conditional_edges("seed", self.fan_out, ["initialization"])
        graph.add_conditional_edges("select", self.fan_out, list(TEMPLATES))
        graph.add_conditional_edges("judge", self.again)
        graph.add_edge("report", END)
        return graph

    def _probabilities(self, state: SearchState) -> dict[Template, float]:
        feasible = population.feasible(state["population"])
        return controller.probabilities(cast("dict[Template, float]", state["weights"]), feasible)

    def _parent(self, candidate: Candidate) -> Parent:
        return Parent(
            name=candidate.name,
            proxy=Proxy(candidate.thought, candidate.code),
            fitness=candidate.value,
            top1=candidate.top1,
            counts=candidate.images,
            rho=candidate.rho,
            bits=[bits.means() for bits in candidate.allocations],
        )

    @staticmethod
    def _entry(index: int, template: Template, parents: list[str]) -> dict[str, Any]:
        return {"name": f"p{index:03d}", "template": template, "parents": parents}

    def _seed_of(self, *parts: object) -> int:
        text = "/".join(map(str, (self.settings.seed, *parts)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def _prints(attempt: Attempt) -> list[str]:
    """The syntax tree of code that parses but fails: proposing it again would fail again."""
    try:
        return [tree_print(attempt.proxy.code)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
