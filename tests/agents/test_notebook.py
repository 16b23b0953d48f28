"""What an answer leaves in the notebook, and which models keep none."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.account import Account
from agents.answer import Answer
from agents.assignment import Outcome
from agents.models import ModelMistake, parse
from agents.notebook import MOST_LINES, lines, reflect
from agents.proposer import Proposer
from agents.replay import written
from tap_eval.measuring.bench import Bench
from tests.agents.scripted import ChatServer, refusal
from tools.sandbox import MontySandbox

OUTCOMES = [
    Outcome("p000", "initialization", "Small layers matter.", 0.5, 0.75, 0.25, rho=0.125),
    Outcome("p001", "mutation", "It fails.", failure="error: line 2", parents={"p000": 0.25}),
]


def test_an_answer_is_lines_without_bullets_and_bounded() -> None:
    assert lines("# Lessons\n\n* One  and\tmore.\n2) Two.\n```\nThree\n```\n") == [
        "Lessons",
        "One and more.",
        "Two.",
        "Three",
    ]
    many = lines("\n".join(f"- {'x' * 5000}" for _ in range(50)))
    assert (len(many), max(map(len, many))) == (MOST_LINES, 240)


def test_a_reflection_is_a_call_of_the_account_and_an_empty_one_changes_nothing(
    bench: Bench, sandbox: MontySandbox, tmp_path: Path
) -> None:
    answers = iter([{"role": "assistant", "content": "- KL fell by half."}, {"role": "assistant", "content": ""}])
    with ChatServer(lambda _: next(answers)) as server:
        proposer = Proposer(parse(f"x@{server.url}"), [bench], sandbox, account=Account(tmp_path / "calls.sqlite"))
        found = reflect(proposer, "notebook 0", 1, [], OUTCOMES)
        assert found
        assert (found.lines, found.tokens) == (("KL fell by half.",), 15)
        again = reflect(proposer, "notebook 1", 1, found.lines, OUTCOMES)
        assert again
        assert again.lines == found.lines
        text = server.asked[0]["messages"][1]["content"]
        assert "- p000 (initialization): KL 0.2500, accuracy 0.7500, rho 0.125, fitness 0.5000. Small layers" in text
        assert "- p001 (mutation of p000, KL 0.2500): died, error: line 2. It fails." in text
        assert proposer.account.spent().calls == 2
        server.script = lambda _: refusal(400, "no")
        with pytest.raises(ModelMistake, match=r"the language model failed .* then resume the run"):
            reflect(proposer, "notebook 2", 1, [], OUTCOMES)
    path = tmp_path / "replay.jsonl"
    path.write_text(written(proposer.account.answers()))
    replayed = Proposer(parse(f"replay:{path}"), [bench], sandbox)
    repeated = reflect(replayed, "notebook 0", 1, [], OUTCOMES)
    assert repeated
    assert repeated.lines == found.lines
    assert reflect(replayed, "notebook 7", 1, [], OUTCOMES) is None


def test_small_models_and_replays_of_before_keep_no_notebook(
    bench: Bench, sandbox: MontySandbox, tmp_path: Path
) -> None:
    path = tmp_path / "replay.jsonl"
    path.write_text(written([("p000", 1, "x", Answer(content="Well."))]))
    for llm in ("embedded", f"replay:{path}"):
        assert reflect(Proposer(parse(llm), [bench], sandbox), "notebook 0", 1, [], OUTCOMES) is None
