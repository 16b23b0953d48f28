"""Servers of language models that are broken, or mean harm: what they send costs no more than it may."""

from __future__ import annotations

import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from agents.account import Account, Conversation, Limits, Spent, Stopping
from agents.chat import ModelMistake
from agents.models import LanguageModel, parse
from agents.proposer import Proposer
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tests.agents.scripted import Answer, ChatServer, proposal, refusal, tool_call
from tests.agents.test_models import ASK, GOOD
from tools.evaluation import Known, Scored
from tools.sandbox import MontySandbox


def ask(server: ChatServer, account: Account, name: str = "p000", *, streams: bool = False, **asking: Any) -> str:
    """What the server says to one call."""
    model = LanguageModel("x", server.url, **asking)
    chat = model.chat(Conversation(account, name, "x"), 0, None, streams=streams)
    return str(chat.invoke("Well?").text)


def whole(content: str, **usage: int) -> dict[str, Any]:
    """The body of an answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "x", "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2} | usage,
    }  # fmt: skip


@pytest.mark.parametrize("usage", [
    {"prompt_tokens": -(10**9)}, {"completion_tokens": -5}, {"prompt_tokens": 10**30}, {"prompt_tokens": 0},
])  # fmt: skip
def test_a_count_that_can_be_none_leaves_the_reservation(usage: dict[str, int]) -> None:
    account = Account(limits=Limits(cost=1.0), prices={"x": (0.0, 1000.0)})
    with ChatServer(lambda _: {"raw": json.dumps(whole("Yes.", **usage)).encode()}) as server:
        for name in ("p000", "p001"):  # the second does not wait for the first for ever
            assert ask(server, account, name, tokens=50) == "Yes."
    assert account.spent().model_copy(update={"tokens_in": 0}) == Spent(calls=2, tokens_in=0, tokens_out=100, cost=0.1)


def test_an_answer_that_unpacks_to_more_or_has_no_end_is_not_taken() -> None:
    packed = gzip.compress(json.dumps(whole("a" * 2**20)).encode())
    answers: list[Answer] = [
        {"raw": packed, "headers": {"Content-Encoding": "gzip"}},
        {"raw": json.dumps(whole("a" * 2**25)).encode()},
    ]
    for answer, says in zip(answers, ("compressed", "longer than 16 MiB"), strict=True):
        with ChatServer(lambda _, answer=answer: answer) as server, pytest.raises(Exception, match=says):
            ask(server, Account(), seconds=60)


def test_a_list_of_models_that_is_too_long_is_not_taken() -> None:
    with ChatServer(lambda _: {}) as server:
        server.models = ["a" * 2**20] * 8
        with pytest.raises(ModelMistake, match="its list of models has no end"):
            parse("x", server.url).check()


def test_a_run_that_is_being_stopped_tries_nothing_again() -> None:
    account = Account(stopping=threading.Event())

    def busy(request: dict[str, Any]) -> Answer:
        threading.Timer(0.3, account.stopping.set).start()
        return refusal(500, "busy", retry_after="20")

    with ChatServer(busy) as server:
        began = time.monotonic()
        with pytest.raises(Stopping):
            ask(server, account)
        assert time.monotonic() - began < 15
        assert len(server.asked) == 1


def test_a_stream_without_a_pause_is_cut_off_in_time() -> None:
    with ChatServer(lambda _: {"floods": True}) as server:
        with pytest.raises(Exception, match="no whole answer within 1 s"):
            ask(server, Account(), streams=True, seconds=1.0)
        done = threading.Event()
        server.script = lambda _: {"raw": json.dumps(whole("Yes.")).encode()}
        threading.Thread(target=lambda: (ask(server, Account()), done.set()), daemon=True).start()
        assert done.wait(20)  # others are heard


def test_arguments_that_are_no_object_are_something_said(bench: Bench, sandbox: MontySandbox) -> None:
    bad = proposal("Because.", GOOD)
    bad["tool_calls"][0]["function"]["arguments"] = "[1, 2]"
    script = iter([bad, proposal("So.", GOOD)])
    with ChatServer(lambda _: next(script)) as server:
        attempt = Proposer(parse("x", server.url), [bench], sandbox).propose(ASK, Known({}))
    assert isinstance(attempt.outcome, Scored)


@pytest.mark.parametrize("pause", ["-1", "nan", "inf"])
def test_a_pause_that_is_none_is_not_kept(pause: str) -> None:
    script = iter([refusal(429, "busy", retry_after=pause), {"raw": json.dumps(whole("Yes.")).encode()}])
    with ChatServer(lambda _: next(script)) as server:
        assert ask(server, Account()) == "Yes."


@pytest.mark.parametrize("streams", [False, True])
def test_a_key_that_a_server_says_back_is_kept_nowhere(
    streams: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-never-to-be-written"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    deep = json.loads("[" * 500 + "]" * 500)
    message = tool_call("Proposal", **{"thought": f"I know {key}.", "code": f"# {key}", key: [{"a": key}], "b": deep})
    message |= {"content": f"It is {key}.", "reasoning_content": f"{key}? {key}!"}
    with (
        ChatServer(lambda _: dict(message)) as server,
        Account(tmp_path / "calls.sqlite", cache=Ledger(tmp_path / "answers.sqlite")) as account,
    ):
        chat = LanguageModel("x", server.url).chat(Conversation(account, "p000", "x"), 0, None, streams=streams)
        said = chat.invoke("Well?")
        (answer,) = (answer for *_, answer in account.answers())
    assert server.keys == [key]
    assert key not in f"{said!r} {answer!r}"
    assert answer.content == "It is ***."
    assert answer.reasoning == "***? ***!"
    args = dict(answer.tool_calls[0].args)
    assert args.pop("b")
    assert args == {"thought": "I know ***.", "code": "# ***", "***": [{"a": "***"}]}
    assert not [path for path in tmp_path.iterdir() if key.encode() in path.read_bytes()]


def test_a_key_that_is_a_common_word_spoils_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    with ChatServer(lambda _: {"raw": json.dumps(whole("A local minimum.")).encode()}) as server:
        assert ask(server, Account()) == "A local minimum."


def test_a_key_that_no_header_can_hold_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer(lambda _: {}) as server:
        monkeypatch.setenv("OPENAI_API_KEY", " sk-plain\n")
        parse("x", server.url).check()
        monkeypatch.setenv("OPENAI_API_KEY", "sk-sec\nret")
        with pytest.raises(ModelMistake, match="OPENAI_API_KEY holds characters that no key has") as caught:
            parse("x", server.url).check()
    assert "ret" not in str(caught.value)
