"""The search: prepare -> seed -> agents -> judge -> reflect -> select -> agents ... -> choose -> report.

Each offspring of a generation is one `Send` to the agent of its template; they run in
parallel and meet in the judge. Every random draw comes from a generator that is seeded by
what it draws for, so that a resumed run gives what it would have given.
"""

from __future__ import annotations

import random
from collections import ChainMap, Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from string import ascii_lowercase
from typing import Any, Literal, cast

from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from agents.notebook import name_of, reflect
from agents.proposer import Attempt, Proposer
from graphs import controller, population, winner
from graphs.context import Job, assignment, jobs, outcomes, seed_of
from graphs.judge import Judge
from graphs.state import TEMPLATES, Bits, Candidate, Generation, SearchInput, SearchState, Template
from tap_eval.measuring.bench import Bench
from tap_eval.proxies.fitness import FitnessWeights
from tap_eval.proxies.proxy import Failure, Rejection
from tools.evaluation import Known, Scored, score, tree_print
from tools.toolbox import Draft

_LATER = {"prints", "bits", "rho", "top1", "kl", "foretelling", "images", "dropped", "fitness"}
"""what the event of a proposal leaves to that of its judgement, or to the result"""
_LONG = {"allocations"}
"""what the state leaves to the event of the proposal"""
_JUDGED = (
    "name", "generation", "template", "fitness", "rho", "top1", "kl", "foretelling", "images", "dropped", "failure",
    "message", "seconds", "tokens",
)  # fmt: skip
"""of a candidate, in the event of its judgement"""
_TRIES = 3
"""of code that once gave its scores in time, before it is taken to be late by itself"""


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


class Search:
    """The nodes of the graph over the agents and a benchmark set, which `open_proposer` supplies.

    `emit` is given every event as a JSON dict; `finish` is called once with the final state, its
    candidates whole. `recall` gives the allocations of a candidate from the event that told of its
    proposal, where that is on record: only those that the next steps look at are held here.
    """

    def __init__(
        self,
        open_proposer: Callable[[], Proposer],
        settings: SearchSettings,
        emit: Callable[[dict[str, Any]], None],
        finish: Callable[[SearchState], None],
        recall: Callable[[str], list[Bits] | None],
    ) -> None:
        self._open_proposer = open_proposer
        self.settings = settings
        self.emit = emit
        self.finish = finish
        self._recall = recall
        self._allocations: dict[str, list[Bits]] = {}

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
        for place, bench in enumerate(self.benches):
            bench.measure(None)
            told = any(bench.prepared is other.prepared for other in self.benches[:place])
            notes, layers = [] if told else bench.notes, len(bench.layers)
            self.emit({"event": "preparing", "network": bench.name, "layers": layers, "notes": notes})
            bench.layer_errors  # noqa: B018 which is when they are measured
            self.emit({"event": "prepared", "network": bench.name})
        return {
            "weights": dict(controller.initial()),
            "generation": 0,
            "population": [],
            "library": [],
            "best": None,
            "finalists": [],
            "notebook": [],
        }

    def seed(self, state: SearchState) -> dict[str, Any]:
        """The initial population: all from the initialization template."""
        return {"plan": [self._entry(index, "initialization", []) for index in range(self.settings.population)]}

    def select(self, state: SearchState) -> dict[str, Any]:
        """Draws a template and its parents for each offspring of the next generation."""
        generation = state["generation"] + 1
        draw = self._probabilities(state)
        first = sum(not record.get("draft_of") for record in state["candidates"].values())
        plan: list[dict[str, Any]] = []
        for index in range(first, first + self.settings.population):
            rng = random.Random(seed_of(self.settings.seed, "select", generation, index))
            template = rng.choices(TEMPLATES, [draw[name] for name in TEMPLATES])[0]
            chosen = population.parents(template, state["population"], state["library"], rng)
            plan.append(self._entry(index, template, chosen))
        return {"generation": generation, "plan": plan}

    def fan_out(self, state: SearchState) -> list[Send]:
        """One job an offspring."""
        return [Send(job["template"], job) for job in jobs(state, self.settings.seed)]

    def offspring(self, job: Job) -> dict[str, Any]:
        """One agent's work: a proposal, scored and allocated, and drafts. A failure of the candidate is a result."""
        attempt = self.proposer.propose(assignment(job, self.settings.seed), Known(job["known"]))
        record = Candidate(
            name=job["name"],
            generation=job["generation"],
            template=job["template"],
            parents=[parent["name"] for parent in job["parents"]],
            thought=attempt.proxy.thought,
            code=attempt.proxy.code,
            seconds=attempt.seconds,
            llm=attempt.llm,
            tokens=attempt.tokens,
            rounds=attempt.rounds,
        )
        if isinstance(attempt.outcome, Rejection):
            failed = attempt.outcome
            record = record.model_copy(
                update={"failure": str(failed.failure), "message": failed.message, "prints": _prints(attempt)}
            )
        else:
            record = self._scored(record, attempt.outcome)
        records = [record, *self._drafts(record, attempt.drafts, job["known"])]
        for each in records:
            told = {"tool_calls": list(attempt.tool_calls), "conversation": list(attempt.conversation)}
            told |= {"notes": list(attempt.notes)}
            self.emit(
                {
                    "event": "proposed",
                    **each.model_dump(mode="json", exclude=_LATER),
                    **(told if each is record else {}),
                }
            )
        return {"candidates": {each.name: each.model_dump(mode="json", exclude=_LONG) for each in records}}

    def _drafts(self, submitted: Candidate, drafts: Sequence[Draft], known: dict[str, str]) -> list[Candidate]:
        """What the agent measured on the way to what it submitted, each a candidate unless it is a duplicate."""
        names = ChainMap(dict.fromkeys(submitted.prints, submitted.name), known)
        found: list[Candidate] = []
        for draft in drafts:
            if Known(names).same_tree(draft.code) or Known(names).same_result(draft.scored):
                continue
            record = submitted.model_copy(
                update={
                    "name": f"{submitted.name}{ascii_lowercase[len(found)]}",
                    "thought": draft.thought or f"A draft of {submitted.name}.",
                    "code": draft.code,
                    "draft_of": submitted.name,
                    **dict.fromkeys(("seconds", "tokens"), 0),
                    **{"failure": None, "message": "", "rounds": 1},
                }
            )
            found.append(self._scored(record, draft.scored))
            names |= dict.fromkeys(draft.scored.prints, record.name)
            if len(found) == len(ascii_lowercase):
                break
        return found

    def _scored(self, record: Candidate, scored: Scored) -> Candidate:
        """With scores, and bits whose allocations are kept here."""
        allocations = self._allocations[record.name] = [Bits.of(allocation) for allocation in scored.allocations]
        return record.model_copy(
            update={
                "scores": [list(of_network) for of_network in scored.scores],
                "prints": list(scored.prints),
                "bits": [bits.means() for bits in allocations],
                "allocations": allocations,
            }
        )

    def judge(self, state: SearchState) -> dict[str, Any]:
        """Fitness of the generation's offspring; then the controller's weights, the library, the population."""
        update, events = self._judged(state)
        for event in events:
            self.emit(event)
        held = {*update["library"], *update["population"]}
        self._allocations = {name: its for name, its in self._allocations.items() if name in held}
        return update

    def so_far(self, state: SearchState, proposed: Mapping[str, dict[str, Any]]) -> SearchState:
        """`state` as it would be had its generation ended with what is `proposed` of it.

        For a search that a limit stops: nothing is emitted, and no checkpoint knows of it, so
        that a resumed search makes the generation whole and judges it anew.
        """
        plan = [entry for entry in state["plan"] if entry["name"] in proposed]
        if not plan:
            return state
        state = {**state, "plan": plan, "candidates": state["candidates"] | dict(proposed)}
        update, _ = self._judged(state)
        candidates = state["candidates"] | update.pop("candidates")
        generations = state["generations"] + update.pop("generations")
        return cast("SearchState", {**state, **update, "candidates": candidates, "generations": generations})

    def _judged(self, state: SearchState) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The update of the judge, and the events that tell of it."""
        records, planned = state["candidates"], [entry["name"] for entry in state["plan"]]
        names = [*planned, *(name for name, record in records.items() if record.get("draft_of") in planned)]
        parents = [name for entry in state["plan"] for name in entry["parents"]]
        looked_at = dict.fromkeys(
            [*names, *state["library"], *state["population"], *parents, *filter(None, [state["best"]])]
        )
        everyone = {
            name: Candidate(**records[name]) for name in (records if self.settings.fitness.gamma else looked_at)
        }
        everyone |= {name: self._whole(everyone[name]) for name in (*names, *state["library"])}
        judged = self._judge.judge(names, everyone, state["library"])
        everyone |= judged
        pool = [everyone[name] for name in state["population"]] + list(judged.values())
        library = population.library([*pool, *(everyone[name] for name in state["library"])])
        keep = population.survivors(pool, self.settings.population)
        values = [candidate.fitness for candidate in judged.values() if candidate.fitness is not None]
        finished = [candidate.value for candidate in judged.values() if not candidate.dropped and not candidate.failure]
        weights = self._learned(state, everyone)
        generation = Generation(
            index=state["generation"],
            probabilities=self._probabilities(state),
            offspring=cast("dict[Template, int]", dict(Counter(entry["template"] for entry in state["plan"]))),
            failures=dict(Counter(each.failure for each in judged.values() if each.failure and not each.draft_of)),
            best=max(finished, default=None),
            mean=sum(values) / len(values) if values else None,
            population=keep,
        )
        events = [self._told(candidate) for candidate in judged.values()]
        events.append({"event": "generation", **generation.model_dump(mode="json"), "weights": dict(weights)})
        conclusion: dict[str, Any] = {
            "candidates": {name: each.model_dump(mode="json", exclude=_LONG) for name, each in judged.items()},
            "weights": dict(weights),
            "population": keep,
            "library": library,
            "best": population.best(everyone.values()),
            "generations": [generation.model_dump(mode="json")],
        }
        return conclusion, events

    def _learned(self, state: SearchState, everyone: Mapping[str, Candidate]) -> dict[Template, float]:
        """The weights of templates after what the offspring of a generation gained; the first has no parents."""
        weights = cast("dict[Template, float]", state["weights"])
        if state["generation"] == 0:
            return weights
        shown = [everyone[name] for name in state["library"]]
        offspring = [
            (
                cast("Template", entry["template"]),
                everyone[entry["name"]].value,
                population.to_beat([everyone[name] for name in entry["parents"]], shown),
            )
            for entry in state["plan"]
        ]
        return controller.UPDATES[self.settings.controller](weights, offspring)

    def _told(self, candidate: Candidate) -> dict[str, Any]:
        """The event that tells of a judged candidate."""
        sizes = [
            bench.size(bits.allocation()).total
            for bench, bits in zip(self.benches, candidate.allocations, strict=False)
        ]
        figures = {name: getattr(candidate, name) for name in _JUDGED}
        return {"event": "judged", **figures, "size_bytes": sizes}

    def again(self, state: SearchState) -> Literal["reflect", "choose"]:
        """Whether there is another generation to come."""
        return "reflect" if state["generation"] < self.settings.generations else "choose"

    def reflect(self, state: SearchState) -> dict[str, Any]:
        """Keeps the notebook: what is to be learned from the generation, where the language model can say that."""
        generation, notebook = state["generation"], state.get("notebook", [])
        name = name_of(generation)
        found = reflect(self.proposer, name, seed_of(self.settings.seed, name), notebook, outcomes(state))
        if found is None:
            return {}
        told = {**asdict(found), "lines": list(found.lines), "conversation": list(found.conversation)}
        self.emit({"event": "reflected", "generation": generation, **told})
        return {"notebook": list(found.lines)}

    def choose(self, state: SearchState) -> dict[str, Any]:
        """The winner among the best few, by images and calibration draws that no candidate was bred on."""
        everyone = [Candidate(**record) for record in state["candidates"].values()]
        best = [self._whole(candidate) for candidate in winner.finalists(everyone)]
        if not best:
            return {"best": None, "finalists": []}
        self.emit({"event": "choosing", "finalists": len(best)})
        found = winner.choose(best, self.benches, self.settings.fitness)
        records = [each.model_dump(mode="json") for each in found]
        self.emit({"event": "chosen", "best": found[0].name, "finalists": records})
        return {"best": found[0].name, "finalists": records}

    def report(self, state: SearchState) -> dict[str, Any]:
        """Hands the final state to `finish`, which reads the test split: no other node does."""
        self.finish(self.whole(state))
        return {}

    def whole(self, state: SearchState) -> SearchState:
        """With the allocations of its candidates."""
        everyone = {name: self._whole(Candidate(**record)) for name, record in state["candidates"].items()}
        return {**state, "candidates": {name: each.model_dump(mode="json") for name, each in everyone.items()}}

    def graph(self, context: type | None = None) -> StateGraph[SearchState, Any, SearchInput]:
        """The state machine, not compiled: the caller brings the checkpointer.

        `context` is what a server may be given with a run, for it to show and to check.
        """
        graph = StateGraph(SearchState, context, input_schema=SearchInput)
        graph.add_node("prepare", self.prepare)
        graph.add_node("seed", self.seed)
        graph.add_node("select", self.select)
        for template in TEMPLATES:
            graph.add_node(template, RunnableLambda(self.offspring), input_schema=Job)
            graph.add_edge(template, "judge")
        graph.add_node("judge", self.judge)
        graph.add_node("reflect", self.reflect)
        graph.add_node("choose", self.choose)
        graph.add_node("report", self.report)
        graph.add_edge(START, "prepare")
        graph.add_edge("prepare", "seed")
        graph.add_conditional_edges("seed", self.fan_out, ["initialization"])
        graph.add_conditional_edges("select", self.fan_out, list(TEMPLATES))
        graph.add_conditional_edges("judge", self.again)
        graph.add_edge("reflect", "select")
        graph.add_edge("choose", "report")
        graph.add_edge("report", END)
        return graph

    def _probabilities(self, state: SearchState) -> dict[Template, float]:
        feasible = population.feasible(state["population"])
        return controller.probabilities(cast("dict[Template, float]", state["weights"]), feasible)

    def _whole(self, candidate: Candidate) -> Candidate:
        if not candidate.bits:
            return candidate
        allocations = self._allocations.get(candidate.name) or self._recall(candidate.name) or self._again(candidate)
        return candidate.model_copy(update={"allocations": allocations})

    def _again(self, candidate: Candidate) -> list[Bits]:
        """What the code of a candidate gives, which is what it gave when it was proposed, however busy the machine."""
        for _ in range(_TRIES):
            scored = score(candidate.code, self.benches, self.proposer.sandbox)
            if not (isinstance(scored, Rejection) and scored.failure is Failure.TIMEOUT):
                break
        bits = [] if isinstance(scored, Rejection) else [Bits.of(allocation) for allocation in scored.allocations]
        if [each.means() for each in bits] != candidate.bits:
            raise RuntimeError(f"the code of {candidate.name} gives other bits than when it was proposed: {scored}")
        return bits

    @staticmethod
    def _entry(index: int, template: Template, parents: list[str]) -> dict[str, Any]:
        return {"name": f"p{index:03d}", "template": template, "parents": parents}


def _prints(attempt: Attempt) -> list[str]:
    """The syntax tree of code that parses but fails: proposing it again would fail again."""
    try:
        return [tree_print(attempt.proxy.code)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
