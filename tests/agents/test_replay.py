"""Answers in a file: what may stand there, and what is said of a file that will not do."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.account import Account
from agents.answer import Answer
from agents.assignment import Assignment
from agents.chat import ModelMistake
from agents.models import parse
from agents.proposer import Attempt, Proposer
from agents.replay import Replay, written
from tap_eval.measuring.bench import Bench
from tests.agents.scripted import ChatServer, proposal, tool_call
from tools.evaluation import Known, Scored
from tools.sandbox import MontySandbox

GOOD = "def sensitivity(layers, task):\n    return [1 / layer['params'] for layer in layers]\n"
BROKEN = "def sensitivity(layers, task):\n    return [1 / 0 for layer in layers]\n"


def propose(llm: str, bench: Bench, sandbox: MontySandbox, account: Account, seed: int = 1) -> Attempt:
    proposer = Proposer(parse(llm), [bench], sandbox, account=account)
    return proposer.propose(Assignment("initialization", (), (), (), seed=seed, name="p000"), Known({}))


def same(attempt: Attempt) -> tuple[object, ...]:
    assert isinstance(attempt.outcome, Scored)
    return attempt.proxy, attempt.outcome.scores, attempt.rounds, attempt.tokens, attempt.tool_calls, attempt.llm


def test_a_proposal_is_repeated_from_what_the_account_kept(bench: Bench, sandbox: MontySandbox, tmp_path: Path) -> None:
    script = iter([tool_call("run_code", code=BROKEN), proposal("One \ud800.", BROKEN), proposal("Two.", GOOD)])
    first, again = Account(), Account()
    with ChatServer(lambda _: next(script)) as server:
        expected = propose(f"x@{server.url}", bench, sandbox, first)
    path = tmp_path / "replay.jsonl"
    path.write_text(written(first.answers()))
    assert same(propose(f"replay:{path}", bench, sandbox, again)) == same(expected)
    assert written(again.answers()) == path.read_text()
    assert (again.spent().calls, again.spent().cost) == (0, 0)


def test_the_embedded_model_is_repeated_in_the_same_way(bench: Bench, sandbox: MontySandbox, tmp_path: Path) -> None:
    account = Account()
    expected = propose("embedded", bench, sandbox, account, seed=5)
    path = tmp_path / "replay.jsonl"
    path.write_text(written(account.answers()))
    assert same(propose(f"replay:{path}", bench, sandbox, Account())) == same(expected)


def test_what_the_file_does_not_say_is_a_mistake(bench: Bench, sandbox: MontySandbox, tmp_path: Path) -> None:
    path = tmp_path / "replay.jsonl"
    with pytest.raises(ModelMistake, match="cannot be read"):
        Replay(path).check()
    path.write_text('{"name": "p000", "call": 1, "code": "x"}\n\n{"name": "p000", "said": "x"}\n')
    with pytest.raises(ModelMistake, match=r"line 3 of the replay file .* is no answer"):
        Replay(path).check()
    path.write_text(written([("p000", 1, "x", Answer(content="Well.")), ("p001", 1, "x", Answer())]))
    Replay(path).check()
    with pytest.raises(ModelMistake, match="has no answer for call 2 of p000"):
        propose(f"replay:{path}", bench, sandbox, Account())
