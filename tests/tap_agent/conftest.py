"""A run that has ended, and conversations about its best proxy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tap_agent.conversation import Conversation
from tap_agent.exit import Exit
from tap_agent.folder import RunFolder
from tap_agent.settings import Settings
from tap_agent.workshop import Workshop
from tests.tap_agent.test_cli import SMALL, tap


@pytest.fixture(scope="session")
def ended(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A small run on the embedded model that has ended."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAP_CACHE", str(cache))
        assert tap("run", *SMALL, "--draws", "1", "--out", str(folder)) == Exit.OK
    return folder


@pytest.fixture
def run(ended: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of that run, to talk about."""
    monkeypatch.setenv("TAP_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "160")
    shutil.copytree(ended, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def talk(run: RunFolder, cache: Path) -> Callable[..., Any]:
    """Opens the conversation about the best proxy, again and again, with the model at a URL."""
    best = run.result()
    assert best

    def opened(url: str | None = None) -> Any:
        changed: dict[str, Any] = {"llm": "scripted", "base_url": url} if url else {}
        settings = Settings.model_validate(run.settings().model_dump() | changed)
        return Talk(run, best.best, Workshop(settings, cache))

    return opened


class Talk:
    """A conversation whose workshop is closed with it."""

    def __init__(self, folder: RunFolder, proxy: str, workshop: Workshop) -> None:
        self.workshop = workshop
        self.conversation = Conversation(folder, proxy, workshop)

    def __enter__(self) -> Conversation:
        return self.conversation

    def __exit__(self, *_: object) -> None:
        self.conversation.__exit__()
        self.workshop.__exit__()
