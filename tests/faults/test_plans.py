"""Every plan, on the program itself: what is said, the exit code, and what is kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_none

from agents import chat
from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tests.agents.scripted import Answer, ChatServer, refusal
from tests.faults.faults import ROOT, Place
from tests.faults.plans import NEW, PLANS, RUN, SETTINGS, Plan
from tests.graphs.test_search import script
from tests.tap_agent.program import hear, tap

SAME = {"generations", "best", "table", "finalists", "candidates"}


class Runs:
    """Folders that everybody may enter: a run that was broken off, the same run at its end, and their cache."""

    def __init__(self, folder: Path, cache: Path, server: ChatServer) -> None:
        self.cache, self.server = folder / "cache", server
        self.begun, self.ended = folder / "begun", folder / "ended"
        shutil.copytree(cache, self.cache)

    def begin(self) -> None:
        """A run whose model refuses one of the two proposals of its last generation; then a copy goes on."""
        seeds: dict[int, None] = {}

        def refuses(request: dict[str, Any]) -> Answer:
            seeds.setdefault(request["seed"])
            last = [*seeds].index(request["seed"]) == 4  # after two proposals, what is learned from them, and one more
            return refusal(400, "no more") if last else script(request)

        self.server.script = refuses
        assert tap("run", *SETTINGS, "--base-url", self.server.url, "--out", str(self.begun)) == Exit.MODEL
        self.server.script = script
        shutil.copytree(self.begun, self.ended)
        assert tap("resume", str(self.ended)) == Exit.OK


@pytest.fixture(scope="module")
def runs(cache: Path) -> Iterator[Runs]:
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        ChatServer(script) as server,
    ):
        Path(folder).chmod(0o755)
        made = Runs(Path(folder), cache, server)
        patch.setenv("TAP_CACHE", str(made.cache))
        made.begin()
        yield made


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_plan(plan: Plan, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        run, cache = Path(folder) / RUN, Path(folder) / "cache"
        shutil.copytree(runs.ended if plan.ended else runs.begun, run)
        shutil.copytree(runs.cache, cache)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TAP_CACHE", str(cache))
        monkeypatch.setenv("COLUMNS", "400")
        monkeypatch.setattr(chat, "_PAUSE", wait_none())  # a test need not wait
        runs.server.asked.clear()
        before = written(run)
        begins = [*SETTINGS, "--base-url", runs.server.url] if plan.command == NEW else []
        command = [*plan.command.split(), *begins]
        with (
            warnings.catch_warnings(record=True, action="always") as warned,
            plan.fault(Place(run, cache, runs.server)),
        ):
            hurt = written(run)
            code, told = interrupted(command, plan.sent, runs.server) if plan.sent else (tap(*command), "")
        said = " ".join([*"".join([*capsys.readouterr(), told]).split(), *(str(each.message) for each in warned)])
        assert (code, plan.sees in said) == (plan.exit, True), said
        assert "Traceback" not in said
        assert ("language model failed" in said) == (plan.kind == "models" and plan.sees != "" and plan.command != NEW)
        assert not list(Path(folder).rglob(".tap-of-*"))
        if plan.then is None:
            assert written(run) == hurt
            assert {path.name for path in Path(folder).iterdir()} == {RUN, "cache"}
            return
        if plan.then:
            assert tap(*plan.then.split()) == Exit.OK
        assert facts(run) == facts(runs.ended)
        assert len({request["seed"] for request in runs.server.asked}) <= 1  # of the proposal without an answer
        if plan.sent:  # an answer that comes after one Ctrl-C is kept
            again = len(runs.server.asked) - len({json.dumps(each, sort_keys=True) for each in runs.server.asked})
            assert (again == 0) == (plan.sent == (signal.SIGINT,))
        assert before["config.yaml"] == (run / "config.yaml").read_bytes()
        assert 0 < RunFolder(run).finished().seconds < 3600


def written(run: Path) -> dict[str, bytes]:
    """What a run's files hold that are read as text."""
    return {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".yaml", ".json")}


def interrupted(command: list[str], signals: Sequence[signal.Signals], server: ChatServer) -> tuple[int, str]:
    """How a process of the program ends that gets `signals`, its children too, in a call, and what it says.

    The call is answered after the last of them, unless that ends the process; none of its processes outlives it.
    """
    server.answers.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", "tap_agent", *command], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=hear,
    )  # fmt: skip
    try:
        while not server.asked:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        for place, number in enumerate(signals):
            if place:
                time.sleep(1)  # till the one before is heard, else both are one
            os.killpg(process.pid, number)
        if len(signals) == 1:
            server.answers.set()
        _, said = process.communicate(timeout=60)
        with pytest.raises(ProcessLookupError):
            _wait_for_all_of(process.pid)
    finally:
        server.answers.set()
        process.kill()
    return abs(process.returncode), said


def _wait_for_all_of(group: int) -> None:
    """Raises `ProcessLookupError` once there is no process of a group."""
    for _ in range(500):
        os.killpg(group, 0)
        time.sleep(0.02)


def facts(run: Path) -> dict[str, Any]:
    """What a run came to, without what a clock put there."""
    found: dict[str, Any] = RunFolder(run).finished().model_dump(include=SAME)
    rows = [{**row, "cost": None} for row in found["table"]]
    return found | {"table": rows, "candidates": [{**each, "seconds": 0.0} for each in found["candidates"]]}


def test_every_plan_is_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    assert [plan.what for plan in PLANS if plan.what not in page] == []
