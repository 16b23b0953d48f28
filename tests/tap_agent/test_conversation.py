"""Conversations that several take part in, and those that come from elsewhere."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import ormsgpack
import pytest
from langgraph.checkpoint.serde.jsonplus import EXT_CONSTRUCTOR_SINGLE_ARG
from starlette.testclient import TestClient

from tap_agent.conversation import Conversation
from tap_agent.folder import RunFolder, RunMistake
from tap_agent.page.app import application
from tap_agent.page.desk import Desk
from tap_agent.terminal import chat
from tap_agent.workshop import Workshop
from tests.agents.scripted import ChatServer
from tests.tap_agent.test_chat import BY_SIZE, BY_STD, agent


def test_two_cannot_answer_at_once(talk: Callable[..., Any]) -> None:
    with ChatServer(agent) as server, talk(server.url) as first, talk(server.url) as second:
        answer = first.say("measure it")
        next(answer)
        with pytest.raises(RunMistake, match="answered elsewhere"):
            list(second.say("show"))
        list(answer)
        (question,) = second.questions
        list(second.answer({question.identity: "no"}))
        with pytest.raises(RunMistake, match="no longer open"):
            first.answer({question.identity: "yes"})
        assert not first.unanswered


def test_both_of_two_that_accept_keep_what_they_accepted(run: RunFolder, cache: Path) -> None:
    result = run.result()
    assert result
    with ExitStack() as stack:
        workshop = stack.enter_context(Workshop(run.settings(), cache))
        proxies = [result.best, next(each.name for each in result.candidates if each.name != result.best)]
        both = [stack.enter_context(Conversation(run, name, workshop)) for name in proxies]
        for conversation, code in zip(both, (BY_STD, BY_SIZE), strict=True):
            list(conversation.say(f"use\n{code}"))
        threads = [threading.Thread(target=lambda each=each: list(each.say("accept"))) for each in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {each.version.name for each in both} == {"c000", "c001"}
    after = run.result()
    assert after
    assert {each.code for each in after.refinements} == {BY_STD, BY_SIZE}


def test_a_page_shows_more_conversations_at_once_than_it_keeps_open(run: RunFolder, cache: Path) -> None:
    result = run.result()
    assert result
    with Desk(run.path.parent, cache) as desk, ThreadPoolExecutor(6) as pool:
        client = TestClient(application(desk, None), base_url="http://127.0.0.1:7860")
        names = [each.name for each in result.candidates if each.failure is None][:4]
        addresses = [f"/runs/{run.name}/talk/{name}" for name in names] * 6
        assert {answer.status_code for answer in pool.map(client.get, addresses)} == {200}


def test_a_conversation_from_elsewhere_runs_nothing_and_steers_no_terminal(
    run: RunFolder, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run.result()
    assert result
    with Workshop(run.settings(), cache) as workshop, Conversation(run, result.best, workshop) as conversation:
        list(conversation.say("help"))
    mark = tmp_path / "was here"
    call = ormsgpack.packb(("os", "mkdir", str(mark)))
    with closing(sqlite3.connect(run.conversations)) as database, database:
        ((found,),) = database.execute("SELECT checkpoint FROM checkpoints ORDER BY checkpoint_id DESC LIMIT 1")
        found = ormsgpack.unpackb(found, ext_hook=ormsgpack.Ext)
        found["channel_values"]["allowance"] = ormsgpack.Ext(EXT_CONSTRUCTOR_SINGLE_ARG, call)
        database.execute("UPDATE checkpoints SET checkpoint = ?", (ormsgpack.packb(found),))
    best = result.candidate(result.best)
    hostile = best.model_copy(update={"thought": "\x1b]0;owned\x07 [/ratio] by [bold"})
    others = [each for each in result.candidates if each.name != best.name]
    run.extend(result.model_copy(update={"candidates": [hostile, *others]}), "")
    with Workshop(run.settings(), cache) as workshop, Conversation(run, result.best, workshop) as conversation:
        assert conversation.messages is not None
        chat.talk(conversation, lambda _: "quit")
    assert not mark.exists()
    said = capsys.readouterr().out
    assert "\x1b]0" not in said
