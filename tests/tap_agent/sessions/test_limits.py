"""Runs that cost money: their limits, their accounts, their keys, and their repetition without a model."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.result import Result
from tap_agent.settings.model import Settings
from tests.agents.scripted import ChatServer, refusal
from tests.graphs.test_search import script
from tests.tap_agent.program import REPLAY, REPLAYED, SMALL, tap

SEARCH = [*SMALL, "--draws", "1", "--seed", "2"]
SAME = {"generations", "best", "table", "candidates"}


def ended(folder: Path) -> Result:
    result = RunFolder(folder).result()
    assert result
    return result


def facts(result: Result) -> dict[str, Any]:
    """The result without what a clock put there."""
    found = result.model_dump(include=SAME)
    return found | {"candidates": [{**each, "seconds": 0} for each in found["candidates"]]}


def rows(folder: Path) -> list[tuple[str, int, str | None]]:
    with sqlite3.connect(folder / "calls.sqlite") as database:
        return database.execute("SELECT name, ordinal, answer FROM calls ORDER BY id").fetchall()


def test_a_limit_ends_a_search_with_its_best_so_far_and_a_higher_one_goes_on(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ChatServer(script) as server:
        llm = ["--llm", f"scripted@{server.url}", "--cache-llm"]
        assert tap("run", *SEARCH, *llm, "--max-calls", "4", "--out", "limited") == Exit.LIMIT
        said = capsys.readouterr()
        assert len(server.asked) == len(rows(work / "limited")) == 4
        assert "measured layer error" in said.out
        assert "4 model calls, 40 tokens in, 20 out, cost unknown" in said.out
        assert "--max-calls 4 is reached" in said.err
        assert "This is the best so far; `tap-agent resume limited` takes the flag." in said.err
        stopped = ended(work / "limited")
        assert stopped.stopped
        assert stopped.spent
        assert stopped.spent.calls == 4
        assert stopped.best in {candidate.name for candidate in stopped.candidates}
        assert "Stopped early" in (work / "limited" / "report.html").read_text()
        assert tap("list", ".") == Exit.OK
        assert "stopped" in capsys.readouterr().out
        assert tap("resume", "limited") == Exit.LIMIT
        assert len(server.asked) == 4
        assert tap("resume", "limited", "--max-calls", "100") == Exit.OK
        paid = len(server.asked)
        assert tap("run", *SEARCH, *llm, "--out", "whole") == Exit.OK
        assert len(server.asked) == paid  # all of it is in the cache, so nothing was paid for twice
    limited, whole = ended(work / "limited"), ended(work / "whole")
    assert facts(limited) == facts(whole)
    assert limited.stopped is None
    assert limited.spent
    assert whole.spent
    assert (limited.spent.calls, whole.spent.calls, whole.spent.cost) == (paid, 0, 0)
    assert (work / "limited" / "replay.jsonl").read_text() == (work / "whole" / "replay.jsonl").read_text()


def test_a_limit_before_anything_lives_is_one_sentence(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "prices.yaml").write_text(yaml.safe_dump({"prices": {"embedded": [1e6, 0]}}))
    assert tap("run", *SEARCH, "--config", "prices.yaml", "--max-cost", "2", "--out", "poor") == Exit.LIMIT
    said = capsys.readouterr().err
    assert "--max-cost 2 would be passed: $0.0000 is spent, and a call of embedded can cost $" in said
    assert "continue with: tap-agent resume poor" in said
    assert RunFolder(work / "poor").result() is None


def test_a_limit_of_cost_needs_the_price(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChatServer(script) as server:
        arguments = ["run", *SEARCH, "--llm", "scripted", "--base-url", server.url, "--max-cost", "1"]
        assert tap(*arguments) == Exit.MODEL
        assert 'write `prices: {"scripted": [USD_IN, USD_OUT]}` into the config' in capsys.readouterr().err
        assert not (work / "runs").exists()
        (work / "prices.yaml").write_text('prices: {"scripted": [1000, 2000]}\n')
        assert tap(*arguments, "--config", "prices.yaml", "--max-cost", "100", "--out", "priced") == Exit.OK
    spent = ended(work / "priced").spent
    assert spent
    assert spent.cost == pytest.approx(spent.calls * 0.02)
    assert f"{spent.calls} model calls, {10 * spent.calls} tokens in, {5 * spent.calls} out, ${spent.cost:.4f}" in (
        capsys.readouterr().out
    )


def test_a_kill_in_the_middle_of_calls_loses_none_and_the_key_is_nowhere(
    work: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-never-to-be-written"
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def telling(request: dict[str, Any]) -> dict[str, Any]:
        answer = script(request)
        for call in answer.get("tool_calls", ()):
            call["function"]["arguments"] = call["function"]["arguments"].replace("Seed", f"{key} Seed")
        return {**answer, "content": f"{answer['content'] or ''} I know {key}.", "reasoning_content": key}

    with ChatServer(lambda _: refusal(400, f"I know {key}")) as server:
        arguments = ["run", *SEARCH, "--llm", f"scripted@{server.url}", "--cache-llm"]
        assert tap(*arguments, "--out", "killed") == Exit.MODEL
        refused = len(rows(work / "killed"))
        server.script, server.delay = telling, 0.4
        running = subprocess.Popen([sys.executable, "-m", "tap_agent", "resume", "killed"], env=os.environ)
        while sum(answer is not None for _, _, answer in rows(work / "killed")) < 4:
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGKILL)
        running.wait()
        before = rows(work / "killed")
        server.delay = 0.0
        assert tap("resume", "killed") == Exit.OK
        after = rows(work / "killed")
        assert len(server.asked) <= len(after)  # what was cut short may not have arrived
        assert tap(*arguments, "--out", "whole") == Exit.OK
    assert set(server.keys) == {key}
    assert len(after) > len(before) > refused
    answered = [(name, ordinal) for name, ordinal, answer in after if answer is not None]
    assert sorted(answered) == sorted((name, ordinal) for name, ordinal, answer in rows(work / "whole") if answer)
    killed = ended(work / "killed")
    assert killed.spent
    assert killed.spent.calls == len(after)
    assert facts(killed) == facts(ended(work / "whole"))
    for folder in (work, cache):
        for path in folder.rglob("*"):
            assert not path.is_file() or key.encode() not in path.read_bytes(), path


def test_several_models_share_the_proposals_and_each_says_which_were_its_own(work: Path) -> None:
    with ChatServer(script) as server:
        assert tap("run", *SEARCH, "--llm", f"embedded,a@{server.url}=2", "--out", "mixed") == Exit.OK
    result = ended(work / "mixed")
    models = {candidate.name: candidate.llm for candidate in result.candidates}
    assert set(models.values()) == {"embedded", f"a@{server.url}"}
    proposed = [event for event in RunFolder(work / "mixed").events() if event["event"] == "proposed"]
    assert {event["name"]: event["llm"] for event in proposed} == models
    assert json.loads((work / "mixed" / "best.json").read_text())["provenance"]["llm"] == models[result.best]


def test_the_file_answers_whatever_a_search_asks_on_any_machine() -> None:
    proposals: dict[str, int] = {}
    calls: dict[str, list[int]] = {}
    for line in map(json.loads, REPLAYED.read_text().splitlines()):
        proposals[line["name"]] = proposals.get(line["name"], 0) + ("code" in line)
        calls.setdefault(line["name"], []).append(line["call"])
    notebooks = {f"notebook {generation}": 0 for generation in range(2)}
    assert proposals == {f"p{place:03}": Settings().rounds for place in range(12)} | notebooks
    assert all(ordinals == list(range(1, len(ordinals) + 1)) for ordinals in calls.values())


def test_a_search_is_repeated_from_a_file_without_any_model(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--population", "4", "--generations", "2", "--search", "200", "--test", "200", "--draws", "1"]
    for name, llm in (("first", REPLAY), ("second", "replay:first/replay.jsonl")):
        assert tap("run", *arguments, "--llm", llm, "--out", name) == Exit.OK
    first, second = ended(work / "first"), ended(work / "second")
    assert facts(first) == facts(second)
    assert first.spent == second.spent
    taken, there = (path.read_text().splitlines() for path in (work / "first" / "replay.jsonl", REPLAYED))
    assert set(taken) <= set(there)
    assert len([candidate for candidate in first.candidates if not candidate.draft_of]) == 12
    assert {candidate.llm for candidate in first.candidates} == {"written with thought", "written by hand"}
    assert (first.candidate("p002").rounds, first.candidate("p002").failure) == (2, None)
    assert first.candidate("p006").failure == "duplicate"
    events = {event["name"]: event for event in RunFolder(work / "first").events() if event["event"] == "proposed"}
    assert events["p001"]["tool_calls"] == ["run_code"]
    assert events["p004"]["tool_calls"] == ["measure"]
    assert {generation.index for generation in first.generations} == {0, 1, 2}
