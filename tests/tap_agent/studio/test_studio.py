"""The LangGraph server as Studio uses it: a real one, over the runs of a folder, asked through its HTTP API."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from graphs.state import Candidate
from tap_agent.exit import Exit
from tap_agent.runs.checkpoints import conversations, tip_of
from tap_agent.runs.folder import RunFolder
from tap_agent.studio import server
from tests.agents.scripted import ChatServer
from tests.graphs.test_search import script
from tests.tap_agent.program import tap
from tests.tap_agent.refining_agent import agent

SMALL = ["--population", "2", "--generations", "1", "--search", "100", "--test", "100", "--draws", "1"]
SETTINGS = {
    "population": 2,
    "generations": 1,
    "networks": [{"search": 100, "test": 100}],
    "calibration_draws": 1,
    "llm": "scripted",
}
MUTATE = {"initialization": 0.0, "mutation": 100.0, "crossover": 0.0}


class Studio:
    """The server over the runs in `folder`/runs, one of which, `first`, the command line has made."""

    def __init__(self, folder: Path, port: int, model: str) -> None:
        self.folder = folder
        self.port = port
        self.model = model
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json=body).raise_for_status().json()

    def get(self, path: str) -> Any:
        return self.client.get(path).raise_for_status().json()

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def runs(self) -> set[str]:
        return {path.name for path in (self.folder / "runs").iterdir()}

    def thread(self, name: str) -> str:
        tip = tip_of(self.run(name))
        assert tip
        return tip.thread

    def go(self, thread: str, **body: Any) -> Any:
        """Runs the search graph in a thread, and gives its last state, or its error."""
        return self.post(f"/threads/{thread}/runs/wait", assistant_id="search", **body)

    def history(self, thread: str) -> list[Any]:
        return list(self.get(f"/threads/{thread}/history?limit=1000"))

    def after_first_generation(self, thread: str) -> dict[str, Any]:
        """The checkpoint at which the next templates are about to be drawn."""
        return dict([state for state in self.history(thread) if state["next"] == ["select"]][-1]["checkpoint"])


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("studio")
    with pytest.MonkeyPatch.context() as patch, ChatServer(script) as model:
        patch.chdir(folder)
        patch.setenv("TAP_CACHE", str(cache))
        arguments = ["run", *SMALL, "--llm", "scripted", "--base-url", model.url, "--seed", "5", "--out", "runs/first"]
        assert tap(*arguments, "--keep-checkpoints", "all") == Exit.OK
        program = [sys.executable, "-m", "tap_agent", "studio", "--port", "0", "--no-browser"]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        with subprocess.Popen(  # in a session of its own, so that it hears the interrupt of a background job too
            program, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as running:
            assert running.stdout
            try:
                said = [running.stdout.readline() for _ in range(2)]
                port = said[0].strip().rpartition("studio/?baseUrl=http://127.0.0.1:")[2]
                assert f"http://127.0.0.1:{port}/docs" in said[1]
                yield Studio(folder, int(port), model.url)
            finally:
                running.send_signal(signal.SIGINT)
        assert running.returncode == Exit.OK


def test_a_run_of_the_command_line_is_a_thread_with_its_history(studio: Studio) -> None:
    thread = studio.thread("first")
    (listed,) = studio.post("/threads/search", metadata={"run": "first"})
    assert (listed["thread_id"], listed["metadata"]["graph_id"]) == (thread, "search")
    state = studio.get(f"/threads/{thread}/state")
    result = studio.run("first").result()
    assert result
    assert (state["next"], state["values"]["best"]) == ([], result.best)
    assert sorted(state["values"]["candidates"]) == [each.name for each in result.candidates]
    history = [state["next"] for state in studio.history(thread)]
    assert [sorted(set(each)) for each in history if len(each) == 1] == [
        ["report"], ["choose"], ["judge"], ["select"], ["reflect"], ["judge"], ["seed"], ["prepare"], ["__start__"],
    ]  # fmt: skip
    assert len(history) == 12


def test_the_state_is_short_and_names_no_channel(studio: Studio) -> None:
    state = studio.get(f"/threads/{studio.thread('first')}/state")
    longest = max(len(text) for record in state["values"]["candidates"].values() for text in _texts(record))
    assert longest == max(len(record["code"]) for record in state["values"]["candidates"].values())
    assert len(json.dumps(state)) < 10_000
    for record in state["values"]["candidates"].values():
        assert not Candidate(**record).allocations


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def test_a_search_through_the_api_is_a_run_like_any_other(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    before = studio.runs()
    thread = studio.post("/threads")["thread_id"]
    values = studio.go(thread, input={}, context={**SETTINGS, "base_url": studio.model})
    (name,) = studio.runs() - before
    result = studio.run(name).result()
    assert result
    assert (result.best, len(result.candidates)) == (values["best"], 4)
    assert result.run == name
    assert all(candidate.allocations for candidate in result.candidates if not candidate.failure)
    assert {path.name for path in studio.run(name).path.iterdir()} >= {
        "config.yaml", "checkpoints.sqlite", "events.jsonl", "proxies", "best.json", "result.json", "report.html",
    }  # fmt: skip
    events = studio.run(name).events()
    assert (events[0]["event"], events[0]["thread"], events[-1]["event"]) == ("started", thread, "finished")
    assert not studio.run(name).is_held()
    assert tap("report", name) == Exit.OK
    assert tap("list") == Exit.OK
    assert capsys.readouterr().out.count("│ finished") == len(studio.runs())
    assert [state["next"] for state in studio.history(thread)][-2:] == [["prepare"], ["__start__"]]
    assert studio.go(thread, input=None)["best"] == result.best  # nothing is left to do, and nothing is done
    assert studio.runs() == before | {name}


def test_a_fork_draws_from_its_own_weights_and_leaves_the_run_as_it_was(studio: Studio) -> None:
    thread, before = studio.thread("first"), studio.runs()
    everything = [path for path in studio.run("first").path.rglob("*") if path.is_file()]
    files = {path: path.read_bytes() for path in everything if ".sqlite" not in path.name}
    checkpoint = studio.after_first_generation(thread)
    studio.post(f"/threads/{thread}/state", values={"weights": MUTATE}, checkpoint=checkpoint, as_node="judge")
    assert studio.get(f"/threads/{thread}/state")["values"]["weights"] == MUTATE
    studio.go(thread, input=None)
    (name,) = studio.runs() - before
    forked, original = studio.run(name).result(), studio.run("first").result()
    assert forked
    assert original
    assert forked.generations[1].probabilities == pytest.approx(
        {"initialization": 0.05, "mutation": 0.9, "crossover": 0.05}
    )
    assert original.generations[1].probabilities["mutation"] < 0.5
    assert forked.generations[0] == original.generations[0]
    assert [each for each in forked.candidates if each.generation == 0] == [
        each for each in original.candidates if each.generation == 0
    ]
    assert len(forked.candidates) == 4
    events = [event["event"] for event in studio.run(name).events()]
    assert [events.count(kind) for kind in ("started", "forked", "resumed", "proposed", "finished")] == [1, 1, 1, 4, 1]
    assert files == {path: path.read_bytes() for path in files}
    answers = [json.loads(line)["name"] for line in (studio.run(name).path / "replay.jsonl").read_text().splitlines()]
    assert set(answers) == {*(each.name for each in forked.candidates), "notebook 0"}
    assert len(studio.history(thread)) == 19


def test_a_search_that_studio_began_is_resumed_by_the_command_line_and_never_written_by_both(
    studio: Studio, capsys: pytest.CaptureFixture[str]
) -> None:
    thread, before = studio.thread("first"), studio.runs()
    checkpoint = studio.after_first_generation(thread)
    update = {"values": {"weights": MUTATE}, "as_node": "judge"}
    tip = studio.post(f"/threads/{thread}/state", checkpoint=checkpoint, **update)["checkpoint"]
    (name,) = studio.runs() - before
    with studio.run(name).held():
        assert "being written by another process" in studio.go(thread, input=None)["__error__"]["message"]
        answer = studio.client.post(f"/threads/{thread}/state", json={**update, "checkpoint": tip})
    assert answer.status_code == 409
    assert "being written by another process" in answer.json()["detail"]
    assert tap("resume", name) == Exit.OK
    assert "report.html" in capsys.readouterr().out
    assert studio.get(f"/threads/{thread}/state")["next"] == []
    assert studio.runs() == before | {name}


def test_a_limit_stops_a_search_that_goes_on_with_a_higher_one(studio: Studio) -> None:
    before = studio.runs()
    thread = studio.post("/threads")["thread_id"]
    settings = {**SETTINGS, "base_url": studio.model, "seed": 5}
    stopped = studio.go(thread, input={}, context={**settings, "max_calls": 3})
    assert "--max-calls 3 is reached" in stopped["__error__"]["message"]
    (name,) = studio.runs() - before
    result = studio.run(name).result()
    assert result
    assert result.stopped
    assert studio.go(thread, input=None, context={"max_calls": 99})["generation"] == 1
    assert studio.run(name).has_ended()
    assert studio.runs() == before | {name}


def test_a_mistake_is_a_sentence_and_leaves_nothing(studio: Studio) -> None:
    before, first = studio.runs(), studio.thread("first")
    begun = "is a search that has begun"
    asked: list[tuple[str | None, dict[str, Any], str]] = [
        (None, {"input": {}, "context": {"genrations": 1}}, "'genrations' is an unknown setting: perhaps generations"),
        (None, {"input": {}, "context": {"networks": [{"network": "resnet81"}]}}, "'resnet81' is an unknown network"),
        (first, {"input": {}}, begun),
        (first, {"input": {}, "checkpoint": studio.after_first_generation(first)}, begun),
        (first, {"input": None, "context": {"population": 9}}, "population = 9 is not that of first"),
        (first, {"input": None, "checkpoint_id": "1f1e8aff-0970-6a6c-8004-9667bee88c66"}, "has no checkpoint 1f1e8aff"),
    ]
    for thread, body, sentence in asked:
        error = studio.go(thread or studio.post("/threads")["thread_id"], **body)["__error__"]
        assert error["error"] == "Refusal"
        assert sentence in error["message"]
    for about in ({"runn": "first"}, {"run": 7}):
        asking = {"assistant_id": "refinement", "context": about, "input": {"messages": []}}
        error = studio.post(f"/threads/{studio.post('/threads')['thread_id']}/runs/wait", **asking)["__error__"]
        assert "is not what a conversation is about: give run, proxy, llm, each as text" in error["message"]
    assert studio.runs() == before


def test_a_conversation_asks_and_goes_on_with_the_answer(studio: Studio) -> None:
    with ChatServer(agent) as talker:
        thread = studio.post("/threads")["thread_id"]
        about = {"assistant_id": "refinement", "context": {"run": "first", "llm": f"scripted@{talker.url}"}}
        said = {"messages": [{"role": "user", "content": "measure it"}]}
        (asked,) = studio.post(f"/threads/{thread}/runs/wait", input=said, **about)["__interrupt__"]
        assert "160 images" in asked["value"]["question"]
        assert studio.get(f"/threads/{thread}/state")["next"] == ["agent"]
        answered = studio.post(f"/threads/{thread}/runs/wait", command={"resume": "yes"}, **about)
    assert "search images" in answered["messages"][-1]["content"]
    result = studio.run("first").result()
    assert result
    assert answered["versions"][-1]["name"] == result.best
    assert thread in conversations(studio.run("first"))


def test_the_graph_is_drawn_and_its_settings_are_a_form(studio: Studio) -> None:
    (assistant,) = studio.post("/assistants/search", graph_id="search")
    edges = {
        (edge["source"], edge["target"])
        for edge in studio.get(f"/assistants/{assistant['assistant_id']}/graph")["edges"]
    }
    for template in ("initialization", "mutation", "crossover"):
        assert {("select", template), (template, "judge")} <= edges
    schemas = studio.get(f"/assistants/{assistant['assistant_id']}/schemas")
    assert schemas["input_schema"]["properties"] == {}
    assert {"population", "generations", "networks", "llm"} <= schemas["context_schema"]["properties"].keys()


def test_pages_of_other_sites_are_refused(studio: Studio) -> None:
    def ask(**headers: str) -> int:
        return studio.client.post(
            "/threads", content=b"{}", headers={"Content-Type": "text/plain", **headers}
        ).status_code

    assert ask() == ask(Origin="https://smith.langchain.com") == 200
    assert ask(Origin="https://elsewhere.example") == 403
    assert ask(Host=f"elsewhere.example:{studio.port}") == 421


def test_a_port_in_use_is_one_sentence(studio: Studio, capsys: pytest.CaptureFixture[str]) -> None:
    assert tap("studio", "--port", str(studio.port), "--no-browser") == Exit.PORT
    said = capsys.readouterr().err
    assert f"127.0.0.1:{studio.port} cannot be listened on (Address already in use): give another --port" in said
    assert len(said.strip().splitlines()) == 1


def test_without_the_extra_the_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert tap("studio") == Exit.STUDIO
    assert "pip install -e '.[studio]'" in capsys.readouterr().err
