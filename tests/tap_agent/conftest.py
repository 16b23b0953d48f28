"""An empty folder to run in, a run that has ended, and conversations about its best proxy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tap_agent.sessions.conversation import Conversation
from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import Settings
from tests.tap_agent.program import REPLAY, SMALL, tap


@pytest.fixture
def work(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with the trained network at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAP_CACHE", str(cache))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def ended(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A small run that has ended, its proposals from a file."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAP_CACHE", str(cache))
        assert tap("run", *SMALL, "--draws", "1", "--llm", REPLAY, "--out", str(folder)) == Exit.OK
    return folder


@pytest.fixture
def run(ended: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of that run, to talk about."""
    monkeypatch.setenv("TAP_CACHE", str(cache))
    shutil.copytree(ended, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def opened(run: RunFolder, cache: Path) -> Callable[..., Any]:
    """Opens the conversation about the best proxy, again and again, with the model at a URL."""
    best = run.result()
    assert best

    def conversation(url: str | None = None) -> Any:
        changed: dict[str, Any] = {"llm": "scripted", "base_url": url} if url else {}
        settings = Settings.model_validate(run.settings().model_dump() | changed)
        return Opened(run, best.best, Resources(settings, cache))

    return conversation


class Opened:
    """A conversation whose resources are closed with it."""

    def __init__(self, folder: RunFolder, proxy: str, resources: Resources) -> None:
        self.resources = resources
        self.conversation = Conversation(folder, proxy, resources)

    def __enter__(self) -> Conversation:
        return self.conversation

    def __exit__(self, *_: object) -> None:
        self.conversation.__exit__()
        self.resources.__exit__()
