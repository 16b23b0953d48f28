"""Conversations in the terminal."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import threading
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import ormsgpack
import pytest
from langgraph.checkpoint.serde.jsonplus import EXT_CONSTRUCTOR_SINGLE_ARG

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tap_agent.sessions.conversation import Conversation
from tap_agent.sessions.resources import Resources
from tap_agent.terminal.chat import converse
from tests.agents.scripted import Answer, ChatServer
from tests.tap_agent.program import tap
from tests.tap_agent.refining_agent import BY_SIZE, agent, text


def test_an_answer_that_was_interrupted_is_heard_later_and_paid_once(
    opened: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    released = threading.Event()

    def slow(request: dict[str, Any]) -> Answer:
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        released.wait(30)
        return text("Since it is wide.")

    def read(prompt: str) -> str:
        if len(asked) == 1:
            released.set()
        asked.append(prompt)
        return lines[len(asked) - 1]

    lines, asked = ["why?", "again", "quit"], list[str]()
    with ChatServer(slow) as server, opened(server.url) as conversation:
        converse(conversation, read)
        assert len(server.asked) == 1
    assert re.search("stopped; again goes on.*Since it is wide", capsys.readouterr().out, re.S)


def test_the_terminal_asks_and_shows(
    run: RunFolder, opened: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(BY_SIZE)
    lines = iter(["change it", "measure it", "yes", "again", f"use {tmp_path / 'mine.py'}", "diff", "quit"])
    asked: list[str] = []

    def read(prompt: str) -> str:
        asked.append(prompt)
        return next(lines)

    with ChatServer(agent) as server, opened(server.url) as conversation:
        converse(conversation, read)
        assert conversation.version.code == BY_SIZE
    shown = capsys.readouterr().out
    assert "→ run_code" in shown
    assert "search images" in shown
    assert '+    return [1.0 / layer["params"]' in shown
    assert [prompt for prompt in asked if prompt.startswith("Measure")]


def test_proxies_are_named_without_doubt(run: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert tap("chat", str(run.path), "--proxy", "0") == Exit.PROXY
    assert "is ambiguous: it may be p0" in capsys.readouterr().err
    assert tap("chat", str(run.path), "--proxy", "nobody") == Exit.PROXY
    assert "no living proxy 'nobody': there are p0" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        assert tap("chat") == Exit.RUN
    assert "no run in runs has ended" in capsys.readouterr().err


def test_a_conversation_from_elsewhere_runs_nothing_and_steers_no_terminal(
    run: RunFolder, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run.result()
    assert result
    with Resources(run.settings(), cache) as resources, Conversation(run, result.best, resources) as conversation:
        list(conversation.say("help"))
    mark = tmp_path / "was here"
    call = ormsgpack.packb(("os", "mkdir", str(mark)))
    with closing(sqlite3.connect(run.conversations)) as database, database:
        ((found,),) = database.execute("SELECT checkpoint FROM checkpoints ORDER BY checkpoint_id DESC LIMIT 1")
        found = ormsgpack.unpackb(zlib.decompress(found), ext_hook=ormsgpack.Ext)
        found["channel_values"]["allowance"] = ormsgpack.Ext(EXT_CONSTRUCTOR_SINGLE_ARG, call)
        database.execute("UPDATE checkpoints SET type = 'msgpack', checkpoint = ?", (ormsgpack.packb(found),))
    best = result.candidate(result.best)
    hostile = best.model_copy(update={"thought": "\x1b]0;owned\x07 [/ratio] by [bold"})
    others = [each for each in result.candidates if each.name != best.name]
    run.extend(result.model_copy(update={"candidates": [hostile, *others]}), "")
    with Resources(run.settings(), cache) as resources, Conversation(run, result.best, resources) as conversation:
        assert conversation.messages is not None
        converse(conversation, lambda _: "quit")
    assert not mark.exists()
    said = capsys.readouterr().out
    assert "\x1b]0" not in said
