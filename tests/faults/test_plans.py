"""Every plan, on the program itself: what is said, the exit code, and what is kept."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tests.faults.plans import PLANS, RUN, SETTINGS, Plan
from tests.tap_agent.program import REPLAYED, tap

SAME = {"generations", "best", "table", "finalists", "candidates"}


class Place:
    """Folders that everybody may enter: a run that was broken off, the same run at its end, and their cache."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.cache = folder / "cache"
        self.replay = folder / "replay.jsonl"
        self.begun, self.ended = folder / "begun", folder / "ended"
        shutil.copytree(cache, self.cache)

    def begin(self) -> None:
        """A run whose model has nothing to say within its last generation; then it has, and a copy goes on."""
        lines = REPLAYED.read_text().splitlines(keepends=True)
        self.replay.write_text("".join(line for line in lines if json.loads(line)["name"] not in ("p004", "p005")))
        assert tap("run", *SETTINGS, "--llm", f"replay:{self.replay}", "--out", str(self.begun)) == Exit.MODEL
        self.replay.write_text("".join(lines))
        shutil.copytree(self.begun, self.ended)
        assert tap("resume", str(self.ended)) == Exit.OK


@pytest.fixture(scope="module")
def place(cache: Path) -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)
        made = Place(Path(folder), cache)
        patch.setenv("TAP_CACHE", str(made.cache))
        made.begin()
        yield made


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_plan(plan: Plan, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        run, cache = Path(folder) / RUN, Path(folder) / "cache"
        shutil.copytree(place.ended if plan.ended else place.begun, run)
        shutil.copytree(place.cache, cache)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TAP_CACHE", str(cache))
        monkeypatch.setenv("COLUMNS", "400")
        before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".yaml", ".json")}
        with warnings.catch_warnings(record=True, action="always") as warned, plan.fault(run, cache):
            hurt = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".yaml", ".json")}
            begins = [*SETTINGS, "--llm", f"replay:{place.replay}"] if plan.command.startswith("run ") else []
            code = tap(*plan.command.split(), *begins)
        said = " ".join([*capsys.readouterr().err.split(), *(str(each.message) for each in warned)])
        assert (code, plan.sees in said) == (plan.exit, True), said
        assert "Traceback" not in said
        assert "language model" not in said
        assert not list(Path(folder).rglob(".new-*"))
        assert not list(cache.rglob("*.safetensors.*"))
        if plan.then is None:
            after = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".yaml", ".json")}
            assert after == hurt
            assert {path.name for path in Path(folder).iterdir()} == {RUN, "cache"}
            return
        if plan.then:
            assert tap(*plan.then.split()) == Exit.OK
        assert facts(run) == facts(place.ended)
        assert before["config.yaml"] == (run / "config.yaml").read_bytes()
        assert 0 < RunFolder(run).finished().seconds < 3600


def facts(run: Path) -> dict[str, Any]:
    """What a run came to, without what a clock put there."""
    found: dict[str, Any] = RunFolder(run).finished().model_dump(include=SAME)
    rows = [{**row, "cost": None} for row in found["table"]]
    return found | {"table": rows, "candidates": [{**each, "seconds": 0.0} for each in found["candidates"]]}


def test_every_plan_is_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    assert [plan.what for plan in PLANS if plan.what not in page] == []
