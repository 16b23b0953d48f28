"""The search with a scripted model: its course, its crashes, and its records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.sqlite import SqliteSaver

from agents.models import LanguageModel, ModelMistake
from agents.proposer import Proposer
from graphs.search import Search, SearchSettings
from graphs.state import Bits, Candidate, SearchState
from tap_eval.measuring.bench import Bench
from tap_eval.proxies.proxy import Failure, Rejection
from tests.agents.scripted import Answer, ChatServer, proposal, tool_call
from tools.sandbox import JSON, MontySandbox

KEYS = ["params", "macs", "depth", "weight_l2", "weight_std", "input_std", "activation_std", "weight_absmax"]
CONFIG: RunnableConfig = {"configurable": {"thread_id": "1"}, "recursion_limit": 1000, "max_concurrency": 4}
START: Any = {"candidates": {}, "generations": []}


def script(request: dict[str, Any]) -> Answer:
    """A proposal that follows from the request alone; one in eight has an error, and repair mends it.

    Without tools it is asked for the notebook.
    """
    if "tools" not in request:
        return {"role": "assistant", "content": f"1. Lesson {request['seed']}.\n\n- Another."}
    seed, rounds = request["seed"], len(request["messages"])
    key, other, power = KEYS[seed % 8], KEYS[seed // 8 % 8], (seed // 64) % 7 - 3
    body = f"[(x['{key}'] + 1e-9) ** {power} * (x['{other}'] + 1e-9) ** 0.{seed % 89 + rounds} for x in layers]"
    if seed % 8 == 0 and rounds < 4:
        body = "[1 / 0 for x in layers]"
    return proposal(f"Seed {seed}.", f"def sensitivity(layers, task):\n    return {body}\n")


class Run:
    """One session of a search over the digits, with what it emitted; `before` are the events of earlier sessions."""

    def __init__(
        self,
        url: str,
        bench: Bench,
        sandbox: MontySandbox,
        settings: SearchSettings,
        before: list[dict[str, Any]],
        allowance: int,
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self.before = before
        self.final: list[SearchState] = []
        proposer = Proposer(LanguageModel("scripted", url), [bench], sandbox, allowance=allowance)
        self.search = Search(lambda: proposer, settings, self.emit, self.final.append, self.recall)

    def recall(self, name: str) -> list[Bits] | None:
        told = [each for each in (*self.before, *self.events) if each["event"] == "proposed" and each["name"] == name]
        return [Bits.model_validate(bits) for bits in told[-1]["allocations"]] if told else None

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def invoke(self, path: Path, start: Any = START) -> SearchState:
        with SqliteSaver.from_conn_string(str(path)) as saver:
            self.search.graph().compile(checkpointer=saver).invoke(start, CONFIG, durability="sync")
        return self.final[-1]


SETTINGS = SearchSettings(population=4, generations=2, controller="dpo", seed=3)


def facts(state: SearchState) -> Any:
    """The state without what a clock put there."""
    candidates = {name: {**record, "seconds": 0} for name, record in state["candidates"].items()}
    return json.loads(json.dumps({**state, "candidates": candidates}))


@pytest.fixture
def open_run(bench: Bench, sandbox: MontySandbox) -> Any:
    with ChatServer(script) as server:

        def opened(
            settings: SearchSettings = SETTINGS,
            answer: Callable[[Any], Answer] = script,
            before: Run | None = None,
            allowance: int = 1,
        ) -> Run:
            server.script = answer
            return Run(server.url, bench, sandbox, settings, before.events if before else [], allowance)

        yield opened


def test_a_search_goes_through_its_generations_and_returns_the_best(open_run: Any, tmp_path: Path) -> None:
    run = open_run()
    state = run.invoke(tmp_path / "c.sqlite")
    candidates = state["candidates"].values()
    assert sorted(state["candidates"]) == [f"p{index:03d}" for index in range(12)]
    assert [generation["index"] for generation in state["generations"]] == [0, 1, 2]
    alive = [each for each in candidates if each["failure"] is None]
    first, *others = state["finalists"]
    assert state["best"] == first["name"]
    assert len({each["name"] for each in state["finalists"]}) == 5
    assert {each["fitness"] for each in state["finalists"]} == set(sorted(each["fitness"] for each in alive)[-5:])
    assert all(each["behind"] <= each["error"] for each in others if each["behind"] < 0)
    for each in alive:
        assert each["fitness"] == pytest.approx(0.1 * each["rho"][0] + 0.9 * each["top1"][0])
    for each in candidates:
        assert (each["template"] == "initialization") == (each["parents"] == [])
    assert len(state["population"]) == 4
    assert len(run.final) == 1


class Busy(MontySandbox):
    """On a machine that has too little time for what it was given `late` times from when that is set."""

    late = 0

    def run(self, code: str, call: str, inputs: Mapping[str, JSON]) -> JSON | Rejection:
        if not self.late:
            return super().run(code, call, inputs)
        self.late -= 1
        return self.limits.hit(Failure.TIMEOUT)


def test_what_a_candidate_gave_in_time_is_computed_again_however_busy_the_machine_is(bench: Bench) -> None:
    final: list[SearchState] = []
    with ChatServer(script) as server, Busy() as sandbox:
        proposer = Proposer(LanguageModel("scripted", server.url), [bench], sandbox)

        def emit(event: dict[str, Any]) -> None:
            if event["event"] == "chosen":
                sandbox.late = 2

        search = Search(lambda: proposer, SETTINGS, emit, final.append, lambda name: None)  # events were lost
        search.graph().compile().invoke(START, CONFIG)
        assert sandbox.late == 0
    candidates = final[-1]["candidates"].values()
    assert all(each["allocations"] for each in candidates if not each["failure"])


def test_the_state_is_plain_json_without_anything_large(open_run: Any, tmp_path: Path) -> None:
    state = open_run().invoke(tmp_path / "c.sqlite")
    assert json.loads(json.dumps(state)) == state
    assert len(json.dumps(state)) < 100_000
    with SqliteSaver.from_conn_string(str(tmp_path / "c.sqlite")) as saver:
        kept = [each.checkpoint["channel_values"].get("candidates", {}) for each in saver.list(CONFIG)]
    assert len(kept[0]) == 12
    assert not [record for each in kept for record in each.values() if record.get("allocations")]
    for name, record in kept[0].items():
        in_full = [Bits.model_validate(bits).means() for bits in state["candidates"][name]["allocations"]]
        assert record["bits"] == in_full


def test_the_same_seed_and_script_give_the_same_search(open_run: Any, tmp_path: Path) -> None:
    one, other = (open_run().invoke(tmp_path / f"{index}.sqlite") for index in range(2))
    assert facts(one) == facts(other)
    different = open_run(SearchSettings(population=4, generations=2, controller="dpo", seed=4))
    assert facts(different.invoke(tmp_path / "2.sqlite")) != facts(one)


@pytest.mark.parametrize("after", [1, 5, 9, 13])
def test_a_search_that_breaks_off_gives_on_resuming_what_it_would_have_given(
    open_run: Any, tmp_path: Path, after: int
) -> None:
    expected = open_run().invoke(tmp_path / "whole.sqlite")
    left = after

    def breaking(request: dict[str, Any]) -> Answer:
        nonlocal left
        left -= 1
        return script(request) if left >= 0 else {"role": "assistant", "tool_calls": "nonsense"}

    broken = open_run(answer=breaking)
    with pytest.raises(ModelMistake, match="the language model failed"):
        broken.invoke(tmp_path / "broken.sqlite")
    resumed = open_run(before=broken)
    assert facts(resumed.invoke(tmp_path / "broken.sqlite", None)) == facts(expected)
    done = {event["name"] for event in broken.events if event["event"] == "judged"}
    again = {event["name"] for event in resumed.events if event["event"] == "proposed"}
    assert not done & again


def test_events_tell_who_proposed_what_from_whom_and_why_it_died(open_run: Any, tmp_path: Path) -> None:
    run = open_run()
    run.invoke(tmp_path / "c.sqlite")
    proposed = [event for event in run.events if event["event"] == "proposed"]
    assert len(proposed) == 12
    for event in proposed:
        assert event["tokens"] >= 15
        assert {"name", "template", "parents", "thought", "code", "failure", "message", "rounds"} <= event.keys()
    assert sum(event["rounds"] > 1 for event in proposed) >= 1
    assert len([event for event in run.events if event["event"] == "judged"]) == 12


def drafting(request: dict[str, Any]) -> Answer:
    """Measures two drafts, one of which has been submitted by all, and then proposes as `script` does."""
    if "tools" not in request:
        return script(request)
    seed, asked = request["seed"], len(request["messages"])
    if asked < 6:
        powers = (-1, 0) if asked == 2 else (seed % 97 / 40 - 1, seed // 97 % 97 / 40 - 1)
        score = "x['depth'] ** {} * x['params'] ** {}".format(*powers)
        code = f"def sensitivity(layers, task):\n    return [{score} for x in layers]\n"
        return tool_call("measure", code=code, **({"thought": f"Powers {powers}."} if asked == 4 else {}))
    return script(request)


def test_what_an_agent_measures_takes_part_in_the_search_and_costs_nothing_more(
    open_run: Any, tmp_path: Path, bench: Bench
) -> None:
    run = open_run(answer=drafting, allowance=2)
    state = run.invoke(tmp_path / "c.sqlite")
    candidates = {name: Candidate(**record) for name, record in state["candidates"].items()}
    drafts = [each for each in candidates.values() if each.draft_of]
    submitted = [each for each in candidates.values() if not each.draft_of]
    assert [each.name for each in submitted] == [f"p{index:03d}" for index in range(12)]
    assert (
        {each.name[:-1] for each in drafts} == {each.draft_of for each in drafts} <= {each.name for each in submitted}
    )
    living = [each for each in drafts if not each.failure]
    same = [each for each in drafts if "** -1 * " in each.code]
    assert len(same) > 1
    assert len([each for each in same if each in living]) <= 1
    assert {each.failure for each in same if each not in living} == {"duplicate"}
    assert len(living) > 1  # of a network with few layers many have the same bits
    for each in living:
        parent = candidates[each.draft_of or ""]
        assert (each.template, each.parents, each.generation) == (parent.template, parent.parents, parent.generation)
        assert each.thought.startswith("Powers ") or each.thought == f"A draft of {parent.name}."
        found = bench.searched(each.allocations[0].allocation())
        assert (each.top1[0], each.tokens) == (pytest.approx(found.top1), 0)
    assert sum(sum(each["offspring"].values()) for each in state["generations"]) == 12
    assert {event["name"] for event in run.events if event["event"] == "judged"} == set(candidates)


def test_drafts_are_the_same_when_a_search_is_resumed(open_run: Any, tmp_path: Path) -> None:
    expected = open_run(answer=drafting, allowance=2).invoke(tmp_path / "whole.sqlite")
    left = 17

    def breaking(request: dict[str, Any]) -> Answer:
        nonlocal left
        left -= 1
        return drafting(request) if left >= 0 else {"role": "assistant", "tool_calls": "nonsense"}

    broken = open_run(answer=breaking, allowance=2)
    with pytest.raises(ModelMistake, match="the language model failed"):
        broken.invoke(tmp_path / "broken.sqlite")
    resumed = open_run(answer=drafting, before=broken, allowance=2)
    assert facts(resumed.invoke(tmp_path / "broken.sqlite", None)) == facts(expected)


def test_a_notebook_is_kept_between_generations_and_shown_to_all_agents(open_run: Any, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def keeping(request: dict[str, Any]) -> Answer:
        asked.append(request)
        return script(request)

    run = open_run(answer=keeping)
    state = run.invoke(tmp_path / "c.sqlite")
    places = [place for place, request in enumerate(asked) if "tools" not in request]
    assert len(places) == SETTINGS.generations
    reflected = [event for event in run.events if event["event"] == "reflected"]
    assert [event["generation"] for event in reflected] == [0, 1]
    for event, place in zip(reflected, places, strict=True):
        assert event["lines"] == [f"Lesson {asked[place]['seed']}.", "Another."]
        assert event["tokens"] == 15
    assert state["notebook"] == reflected[-1]["lines"]
    first, second = (asked[place]["messages"] for place in places)
    assert first[0] == asked[0]["messages"][0]
    assert "It is empty." in first[1]["content"]
    for name, record in state["candidates"].items():
        text = (first if record["generation"] == 0 else second)[1]["content"]
        assert record["generation"] == 2 or f"- {name} (" in text
    assert f"- {reflected[0]['lines'][0]}" in second[1]["content"]
    for place, request in enumerate(asked):
        if place not in places:
            generation = sum(place > each for each in places)
            shown = [event["lines"][0] in request["messages"][1]["content"] for event in reflected]
            assert shown == [generation == 1, generation == 2]


def test_twins_of_one_generation_are_one_life_and_one_death(open_run: Any, tmp_path: Path) -> None:
    same = proposal("Same.", "def sensitivity(layers, task):\n    return [x['depth'] for x in layers]\n")
    state = open_run(SearchSettings(population=3, generations=1), lambda _: same).invoke(tmp_path / "c.sqlite")
    deaths = [each["failure"] for _, each in sorted(state["candidates"].items())]
    assert deaths == [None, *["duplicate"] * 5]
    assert state["best"] == "p000"


def test_a_search_in_which_nobody_lives_ends_with_no_best(open_run: Any, tmp_path: Path) -> None:
    bad = proposal("Bad.", "import os\n")
    state = open_run(SearchSettings(population=2, generations=1), lambda _: bad).invoke(tmp_path / "c.sqlite")
    assert state["best"] is None
    assert {each["failure"] for each in state["candidates"].values()} == {"forbidden"}
    assert all(re.search("`os` cannot be imported", each["message"]) for each in state["candidates"].values())


def test_cost_and_novelty_enter_fitness_where_they_are_asked_for(open_run: Any, tmp_path: Path) -> None:
    from tap_eval.proxies.fitness import FitnessWeights

    settings = SearchSettings(population=3, generations=0, fitness=FitnessWeights(0.1, 0.5, 0.5))
    state = open_run(settings).invoke(tmp_path / "c.sqlite")
    plain = open_run(SearchSettings(population=3, generations=0)).invoke(tmp_path / "d.sqlite")
    for name, each in state["candidates"].items():
        if each["fitness"] is not None:
            assert each["fitness"] != plain["candidates"][name]["fitness"]


def test_a_race_drops_the_hopeless_and_never_returns_one_of_them(open_run: Any, tmp_path: Path, bench: Bench) -> None:
    whole = bench.compared
    settings = SearchSettings(population=8, generations=2, controller="uniform", seed=3, racing=0.1)
    state = open_run(settings).invoke(tmp_path / "c.sqlite")
    alive = [each for each in state["candidates"].values() if each["failure"] is None]
    dropped = [each for each in alive if each["dropped"]]
    assert dropped
    assert all(each["images"][0] < whole for each in dropped)
    assert all(each["images"] == [whole] for each in alive if not each["dropped"])
    best = state["candidates"][state["best"]]
    assert not best["dropped"]
    for each in dropped:
        full = bench.searched(Candidate(**each).allocations[0].allocation()).top1
        assert 0.1 * each["rho"][0] + 0.9 * full <= max(each["fitness"] for each in state["finalists"])
