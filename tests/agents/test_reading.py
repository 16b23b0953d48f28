"""Answers as servers and small models give them: what is in them is taken, and what is not is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_none

from agents import chat
from agents.account import Account
from agents.answer import LONGEST_TEXT, LONGEST_THOUGHT, MOST_CALLS
from agents.models import parse
from agents.proposer import Attempt, Proposer
from agents.reading import NO_THOUGHT, arguments, code, spoken, without_thinking, written
from agents.replay import written as replay
from tap_eval.measuring.bench import Bench
from tap_eval.proxies.proxy import Failure, Proxy, Rejection
from tests.agents.scripted import Answer, ChatServer, proposal, tool_call
from tests.agents.test_models import ASK, GOOD
from tools.evaluation import Known, Scored
from tools.sandbox import MontySandbox

FENCED = f"```python\n{GOOD}```"
WHOLE = {"thought": "By size.", "code": GOOD}
CUT = '{"thought": "By size.", "code": "cache = {}\\ndef sensitivity(layers, task):\\n    return [la'


def propose(
    script: list[Answer], bench: Bench, sandbox: MontySandbox, account: Account | None = None, **options: Any
) -> tuple[Attempt, list[dict[str, Any]]]:
    answers = iter(script)
    with ChatServer(lambda _: next(answers)) as server:
        proposer = Proposer(parse(f"x@{server.url}"), [bench], sandbox, account=account or Account(), **options)
        return proposer.propose(ASK, Known({})), server.asked


def says(content: str | None, **more: Any) -> Answer:
    return {"role": "assistant", "content": content, **more}


def submits(given: object, name: str = "Proposal", **more: Any) -> Answer:
    """A proposal whose arguments are `given` as they stand."""
    function = {"name": name, "arguments": given}
    return says(None, tool_calls=[{"id": "c1", "type": "function", "function": function}], **more)


@pytest.mark.parametrize(
    ("answer", "thought"),
    [
        pytest.param(submits(WHOLE), "By size.", id="arguments are an object"),
        pytest.param(submits(json.dumps(json.dumps(WHOLE))), "By size.", id="arguments are JSON in JSON"),
        pytest.param(submits(f"```json\n{json.dumps(WHOLE)}\n```"), "By size.", id="arguments are in a fence"),
        pytest.param(submits(GOOD), NO_THOUGHT, id="arguments are the code"),
        pytest.param(proposal("<think>Hm.</think> By size.", FENCED), "By size.", id="code in a fence, after thinking"),
        pytest.param(
            proposal("By size.", f"Here it is:\n\n{FENCED}\nThis weighs…"), "By size.", id="words around code"
        ),
        pytest.param(proposal("By size.", GOOD.replace("\n", "\\n")), "By size.", id="line ends as text"),
        pytest.param(tool_call("Proposal", thought=["By", "size."], code=GOOD.split("\n")), "By\nsize.", id="lines"),
        pytest.param(tool_call("Proposal", code=GOOD), NO_THOUGHT, id="no thought"),
        pytest.param(tool_call("Proposal", thought=FENCED), FENCED.strip(), id="code in the thought"),
        pytest.param(tool_call("Proposal", code=GOOD) | {"content": "By size."}, "By size.", id="thought is said"),
        pytest.param(submits(json.dumps(WHOLE), "functions.proposal:0"), "By size.", id="name in another form"),
        pytest.param(
            says(None, function_call={"name": "Proposal", "arguments": json.dumps(WHOLE)}), "By size.", id="legacy"
        ),
        pytest.param(
            says(None, tool_calls=[{"function": {"name": "Proposal", "arguments": WHOLE}}]), "By size.", id="no id"
        ),
        pytest.param(
            says(None, tool_calls=[{"name": "Proposal", "arguments": json.dumps(WHOLE)}]), "By size.", id="flat"
        ),
        pytest.param(
            says(None, tool_calls=[*proposal("By size.", GOOD)["tool_calls"], *proposal("B", "x")["tool_calls"]]),
            "By size.",
            id="two submissions",
        ),
        pytest.param(
            says("<tool_call>\n" + json.dumps({"name": "Proposal", "arguments": WHOLE}) + "\n</tool_call>"),
            "By size.",
            id="a call between tags",
        ),
        pytest.param(
            says(
                "<tool_call>\n<function=Proposal>\n<parameter=thought>\nBy size.\n</parameter>\n"
                f"<parameter=code>\n{GOOD}</parameter>\n</function>\n</tool_call>"
            ),
            "By size.",
            id="a tag a parameter",
        ),
        pytest.param(
            says("[TOOL_CALLS]" + json.dumps([{"name": "Proposal", "arguments": WHOLE}])), "By size.", id="a list"
        ),
        pytest.param(says(f"Sure! {json.dumps(WHOLE)}"), "By size.", id="JSON alone"),
        pytest.param(
            says(f"<think>\n{FENCED.replace('params', 'macs')}\n</think>\n\nBy size:\n{FENCED}\n"),
            "By size:",
            id="code in a fence alone, after thinking",
        ),
        pytest.param(says(f"Bits matter.</think>By size.\n{FENCED[:-3]}"), "By size.", id="thinking the prompt began"),
        pytest.param(says(GOOD), NO_THOUGHT, id="code alone"),
        pytest.param(submits(json.dumps(WHOLE), finish_reason="length"), "By size.", id="cut after it was whole"),
    ],
)
def test_a_proposal_is_taken_however_it_is_written(
    answer: Answer, thought: str, bench: Bench, sandbox: MontySandbox, tmp_path: Path
) -> None:
    account = Account()
    attempt, asked = propose([answer], bench, sandbox, account)
    assert isinstance(attempt.outcome, Scored)
    assert (attempt.proxy.thought, attempt.proxy.code.strip()) == (thought, GOOD.strip())
    assert len(asked) == account.spent().calls == 1
    path = tmp_path / "replay.jsonl"
    path.write_text(replay(account.answers()))
    again = Proposer(parse(f"replay:{path}"), [bench], sandbox).propose(ASK, Known({}))
    assert (again.proxy, again.tokens) == (attempt.proxy, attempt.tokens)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        pytest.param(says(""), "the model's answer was empty.", id="empty"),
        pytest.param(says("<think>Hm.</think>\n"), "the model's answer was empty.", id="thinking alone"),
        pytest.param(says("Well."), "the model submitted no proposal.", id="talk"),
        pytest.param(says("", finish_reason="length"), "cut off .* raise answer_tokens", id="cut"),
        pytest.param(submits(CUT, finish_reason="length"), "cut off .* raise answer_tokens", id="cut in a call"),
        pytest.param(says(FENCED[:-9], finish_reason="length"), "cut off", id="cut in code"),
        pytest.param(says("", finish_reason="content_filter"), "content filter withheld", id="filtered"),
        pytest.param(says(None, refusal="I cannot."), "the model refused: I cannot.", id="refused"),
    ],
)
def test_an_answer_that_holds_no_proposal_is_named_to_the_model_and_to_the_user(
    answer: Answer, message: str, bench: Bench, sandbox: MontySandbox
) -> None:
    attempt, asked = propose([dict(answer), dict(answer)], bench, sandbox, rounds=2)
    assert isinstance(attempt.outcome, Rejection)
    assert attempt.outcome.failure is Failure.UNPARSABLE
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(attempt.outcome.message)
    assert attempt.outcome.message in asked[1]["messages"][-1]["content"]
    assert asked[1]["messages"][2]["content"]  # servers refuse to read an empty answer


def test_a_proxy_that_failed_is_told_though_later_answers_were_empty(bench: Bench, sandbox: MontySandbox) -> None:
    attempt, _ = propose([proposal("One.", "x = 1\n"), says("")], bench, sandbox, rounds=2)
    assert attempt.proxy == Proxy("One.", "x = 1\n")
    assert isinstance(attempt.outcome, Rejection)
    assert "define a top-level function" in attempt.outcome.message


ENVELOPE = {"id": "x", "object": "chat.completion", "created": 0, "model": "x"}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"raw": json.dumps(ENVELOPE).encode()[:-9]}, id="JSON without an end"),
        pytest.param({"raw": b"<html>Sign in</html>", "headers": {"Content_Type": "text/html"}}, id="a page"),
        pytest.param({"raw": b'{"error": {"message": "Provider returned error", "code": 502}}'}, id="an error"),
        pytest.param({"raw": json.dumps(ENVELOPE | {"choices": []}).encode()}, id="no choices"),
        pytest.param({"raw": json.dumps(ENVELOPE | {"choices": [{"message": None}]}).encode()}, id="no message"),
        pytest.param({"raw": b"null"}, id="null"),
        pytest.param({"raw": b"\xff\xfe{}"}, id="bytes"),
        pytest.param({"half": json.dumps(ENVELOPE).encode()}, id="a cut connection"),
        pytest.param(says("", finish_reason="error"), id="broken off by the server"),
    ],
)
def test_what_is_no_answer_is_asked_for_again_and_may_have_cost(
    answer: Answer, bench: Bench, sandbox: MontySandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_PAUSE", wait_none())  # a test need not wait
    account = Account(prices={})
    attempt, asked = propose([answer, proposal("So.", GOOD)], bench, sandbox, account)
    assert isinstance(attempt.outcome, Scored)
    assert len(asked) == account.spent().calls == 2
    assert account.spent().tokens_in > 1000  # the first counts at its reservation
    assert [place[:2] for place in account.answers()] == [("p000", 1)]


def test_of_many_calls_some_count_and_a_submission_always(bench: Bench, sandbox: MontySandbox) -> None:
    calls = [tool_call("run_code", code=GOOD)["tool_calls"][0] for _ in range(200)]
    many = says(None, tool_calls=[*calls, *proposal("So.", GOOD)["tool_calls"]])
    attempt, asked = propose([says(None, tool_calls=calls), many], bench, sandbox)
    assert isinstance(attempt.outcome, Scored)
    assert [message["role"] for message in asked[1]["messages"]].count("tool") == MOST_CALLS
    assert len({call["id"] for call in asked[1]["messages"][2]["tool_calls"]}) == MOST_CALLS
    assert "(184 more calls were left out.)" in asked[1]["messages"][2]["content"]


def test_an_answer_of_megabytes_is_bounded_where_it_enters(bench: Bench, sandbox: MontySandbox) -> None:
    long, account = "ab " * 2**20, Account()
    deep = json.loads("[" * 500 + "]" * 500)
    called = tool_call(long, other=long, deep=deep)
    called["tool_calls"] += tool_call("run_code", **dict.fromkeys(map(str, range(99)), long[:9999]))["tool_calls"]
    script = [called | {"content": long, "reasoning_content": long}, proposal("So.", f"# {long}"), proposal(long, GOOD)]
    attempt, asked = propose(script, bench, sandbox, account)
    assert isinstance(attempt.outcome, Scored)
    assert len(attempt.proxy.thought) == LONGEST_THOUGHT
    assert "longer than 20,000 characters" in str(asked[2]["messages"])
    assert len(json.dumps(attempt.conversation)) < 8 * LONGEST_TEXT
    assert len(replay(account.answers())) < 8 * LONGEST_TEXT


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"a": 1}, {"a": 1}), (None, {}), ("", {}), ('{"a": 1}', {"a": 1}), ('"{\\"a\\": 1}"', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}), ('{"a": "one\ntwo"}', {"a": "one\ntwo"}), ("[1]", None), ("5", None),
        ('{"a": "cut {}', None), ('{"a":' * 9999 + "1" + "}" * 9999, None), ([1], None),
    ],
)  # fmt: skip
def test_arguments_are_an_object_or_none(given: object, found: dict[str, Any] | None) -> None:
    assert arguments(given) == found


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("a = '```'\n", "a = '```'\n"), ('a = "\\n"', 'a = "\\n"'), ("  ~~~py\n  a = 1\n~~~", "a = 1\n"),
        ("```\nb\n```\n```python\ndef sensitivity(l, t): ...\n```", "def sensitivity(l, t): ...\n"),
        ("if a:\\n    b = \\\"c\\\"", 'if a:\n    b = "c"'), (["a = 1", "b = 2"], "a = 1\nb = 2"),
        ("no code", "no code"),
    ],
)  # fmt: skip
def test_code_that_parses_is_left_as_it_is_and_other_code_unwrapped(given: object, found: str) -> None:
    assert code(given) == found


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Yes.", "Yes."), ("a < b", "a < b"), ("<think>a</think>\nb", "b"), ("[THINK]a[/THINK]b", "b"),
        ("<think>a", ""), ("a</think> b", "b"), ("a <thinking>b</thinking>c", "a c"),
    ],
)  # fmt: skip
def test_thinking_is_left_out_and_with_it_what_came_before_its_end(text: str, rest: str) -> None:
    assert without_thinking(text) == rest


@pytest.mark.parametrize(
    ("text", "shown"), [("Yes.", "Y"), ("<think>a</think>b", ""), ("<i>", "<i"), ("<think>a", None)]
)
def test_an_answer_is_shown_once_it_cannot_be_thinking(text: str, shown: str | None) -> None:
    heads = (spoken(text[:end]) for end in range(len(text) + 1))
    assert next((head for head in heads if head is not None), None) == shown


def test_only_what_is_offered_is_called_and_code_is_shown_to_whom_reads_it() -> None:
    called = '<tool_call>{"name": "propose", "arguments": {"code": "a"}}</tool_call> So.'
    assert written(called, ["propose"]) == ("So.", [{"name": "propose", "args": {"code": "a"}}])
    assert written(called, ["measure"]) == (called, [])
    assert written(FENCED, ["propose"]) == (FENCED, [])


def test_a_hostile_text_is_read_in_a_moment() -> None:
    """A pattern that looks ahead from every place to the end would take hours."""
    for part in ("<think>", "</think>", "<tool_call>", "<function=a>", "```\n", "~~~", '{"a":', "[TOOL_CALLS]{"):
        assert written(without_thinking(part * 9000), ["Proposal"])[1] == []
