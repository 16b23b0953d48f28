"""Parameters that a server refuses: left out from then on, with a word to the user, and paid for once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage

from agents.account import Account, Conversation
from agents.models import LanguageModel, parse
from agents.parameters import Parameter, Refused, accepted, named
from agents.proposer import Proposer
from agents.reading import notes
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tests.agents.scripted import Answer, ChatServer, proposal, refusal
from tests.agents.test_models import ASK, GOOD
from tools.evaluation import Known, Scored
from tools.sandbox import MontySandbox

PARAMETERS: tuple[Parameter, ...] = ("seed", "temperature", "max_tokens", "tool_choice")
NAMED = [
    lambda name: refusal(400, f"Unsupported parameter: '{name}' is not supported with this model."),
    lambda name: refusal(422, {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs"}]}),
]


def strict(name: str, words: Callable[[str], Answer]) -> Callable[[dict[str, Any]], Answer]:
    return lambda request: words(name) if name in request else {"role": "assistant", "content": "Yes."}


def ask(model: LanguageModel, account: Account, name: str = "p000", *, streams: bool = False) -> AIMessage:
    chat = model.chat(Conversation(account, name, model.spec), 1, None, streams=streams)
    answer = chat.bind_tools([], tool_choice="any").invoke("Well?")
    assert isinstance(answer, AIMessage)
    return answer


def model_at(server: ChatServer, **options: Any) -> LanguageModel:
    (model,) = parse(f"vllm:x@{server.url}", **options).members
    return model


@pytest.mark.parametrize("words", NAMED)
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", PARAMETERS)
def test_it_is_asked_again_without_once_and_later_calls_begin_without(
    name: str, streams: bool, words: Callable[[str], Answer]
) -> None:
    account = Account()
    with ChatServer(strict(name, words)) as server:
        model = model_at(server)
        first, second = (ask(model, account, each, streams=streams) for each in ("p000", "p001"))
    assert [name in request for request in server.asked] == [True, False, False]
    assert notes([first, second]) == notes([first])
    assert f"{model.spec} refuses {name}, which is left out from now on" in notes([first])[0]
    assert first.text == second.text == "Yes."
    spent = account.spent()
    assert (spent.calls, spent.tokens_in, spent.tokens_out) == (3, 20, 10)  # a refusal is free


def test_one_that_streams_does_without_a_count_of_tokens() -> None:
    with ChatServer(strict("stream_options", NAMED[0])) as server:
        assert ask(model_at(server), Account(), streams=True).text == "Yes."
    assert ["stream_options" in request for request in server.asked] == [True, False]


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_the_user_leaves_out_is_never_sent(name: Parameter) -> None:
    with ChatServer(strict(name, NAMED[0])) as server:
        assert notes([ask(model_at(server, leave_out=(name,)), Account())]) == []
    (request,) = server.asked
    assert {*PARAMETERS} - request.keys() == {name}


def test_all_may_be_refused_and_what_is_asked_for_instead_is_sent() -> None:
    def strictest(request: dict[str, Any]) -> Answer:
        for name in ("seed", "temperature", "tool_choice"):
            if name in request:
                return NAMED[0](name)
        if "max_tokens" in request:
            return refusal(400, "'max_tokens' is not supported. Use 'max_completion_tokens' instead.")
        return {"role": "assistant", "content": "Yes."}

    with ChatServer(strictest) as server:
        answer = ask(model_at(server, tokens=99), Account())
    assert (len(server.asked), len(notes([answer]))) == (5, 4)
    assert server.asked[-1]["max_completion_tokens"] == 99
    assert not {*PARAMETERS} & server.asked[-1].keys()


@pytest.mark.parametrize("words", [refusal(400, "no such model"), refusal(404, "seed"), refusal(400, "max_tokens")])
def test_another_refusal_is_asked_once(words: Answer) -> None:
    with ChatServer(lambda _: words) as server, pytest.raises(Exception, match=f"code: {words['status']}"):
        ask(model_at(server, leave_out=("max_tokens",)), Account())
    assert len(server.asked) == 1


def test_the_first_that_is_named_is_meant_and_two_names_do_not_take_turns() -> None:
    request = {"seed": 1, "temperature": 0.5, "max_tokens": 9}
    assert named(request, "temperature needs no seed") == ("temperature", None)
    assert named({"seed": 1}, "temperature") is None
    refused, words = Refused(), "'max_tokens' or 'max_completion_tokens' is too large"
    for sent in ({"max_completion_tokens": 9}, {}):
        found = named(accepted({"max_tokens": 9}, refused.known()), words)
        assert found
        assert refused.learn(*found)
        assert accepted({"max_tokens": 9}, refused.known()) == sent


def test_what_was_asked_for_in_vain_is_not_asked_or_paid_for_again(
    bench: Bench, sandbox: MontySandbox, tmp_path: Path
) -> None:
    def script(request: dict[str, Any]) -> Answer:
        return NAMED[0]("seed") if "seed" in request else proposal("So.", GOOD)

    cache, path = Ledger(tmp_path / "answers.sqlite"), tmp_path / "calls.sqlite"
    with ChatServer(script) as server:
        told = []
        for account in (Account(path), Account(path), Account(cache=cache), Account(cache=cache)):
            proposer = Proposer(parse(f"x@{server.url}"), [bench], sandbox, account=account)
            attempt = proposer.propose(ASK, Known({}))
            assert isinstance(attempt.outcome, Scored)
            told.append(len(attempt.notes))
    assert told == [1, 0, 1, 0]
    assert len(server.asked) == 4  # the second account resumes the first, and the last has the cache
    assert [account.spent().calls for account in (Account(path), account)] == [2, 0]
