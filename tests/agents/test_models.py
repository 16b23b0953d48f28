"""Which model is asked, where, with which key, and what becomes of slow, failing and talkative servers."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.account import Account, Conversation, Spent
from agents.assignment import Assignment
from agents.chat import ModelMistake
from agents.connection import client
from agents.models import PROVIDERS, LanguageModel, Mixture, parse, priced
from agents.proposer import Attempt, Proposer
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.proxies.proxy import Rejection
from tests.agents.scripted import Answer, ChatServer, proposal, refusal, tool_call
from tools.evaluation import Known, Scored
from tools.sandbox import MontySandbox

GOOD = "def sensitivity(layers, task):\n    return [1 / layer['params'] for layer in layers]\n"
ASK = Assignment("initialization", (), (), (), seed=1, name="p000")


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for provider in PROVIDERS.values():
        monkeypatch.delenv(provider.key, raising=False)


def propose(llm: str, bench: Bench, sandbox: MontySandbox, account: Account | None = None, **asking: Any) -> Attempt:
    proposer = Proposer(parse(llm, **asking), [bench], sandbox, account=account or Account())
    return proposer.propose(ASK, Known({}))


@pytest.mark.parametrize(
    ("provider", "limit", "choice"),
    [
        ("openai", "max_completion_tokens", "required"), ("xai", "max_completion_tokens", "required"),
        ("deepseek", "max_tokens", "auto"), ("qwen", "max_tokens", "auto"), ("vllm", "max_tokens", "required"),
    ],
)  # fmt: skip
def test_each_provider_is_asked_in_its_own_way_with_its_own_key(
    provider: str, limit: str, choice: str, bench: Bench, sandbox: MontySandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the key of another")
    monkeypatch.setenv(PROVIDERS[provider].key, "its own key")
    with ChatServer(lambda _: proposal("Because.", GOOD)) as server:
        attempt = propose(f"{provider}:m-1:8b@{server.url}", bench, sandbox, tokens=777)
        parse(f"{provider}:m-1:8b@{server.url}").check()
    (request,) = server.asked
    assert server.keys == ["its own key"]
    assert (request["model"], request[limit], request["tool_choice"]) == ("m-1:8b", 777, choice)
    assert not {"max_tokens", "max_completion_tokens"} - {limit} & request.keys()
    assert attempt.llm == f"{provider}:m-1:8b@{server.url}"


@pytest.mark.parametrize("spec", ["openai:gpt-x", "deepseek:x", "qwen:x", "xai:x", "gpt-x", "embedded,xai:x=2"])
def test_a_preset_without_its_key_names_the_variable(spec: str) -> None:
    key = PROVIDERS[next((name for name in PROVIDERS if f"{name}:" in spec), "openai")].key
    with pytest.raises(ModelMistake, match=f"needs a key: set {key}"):
        parse(spec).check()


def test_an_address_alone_takes_the_first_model_that_is_listed(bench: Bench, sandbox: MontySandbox) -> None:
    with ChatServer(lambda _: proposal("Because.", GOOD)) as server:
        with pytest.raises(ModelMistake, match="lists no model: name one, as --llm MODEL@http"):
            parse(server.url).check()
        server.models = ["first", "second"]
        propose(server.url, bench, sandbox)
        assert server.asked[0]["model"] == "first"


@pytest.mark.parametrize(
    ("llm", "says"),
    [
        ("", "names no language model"), ("opnai:gpt-x", "'opnai' in --llm opnai:gpt-x is no provider: known are op"),
        ("openai:", "names no model"), ("openai:gpt-x=often", "'often' in --llm openai:gpt-x=often is no weight"),
        ("openai:gpt-x=0", "give a positive number"), ("embedded,embedded=-1", "give a positive number"),
    ],
)  # fmt: skip
def test_what_names_no_model_is_a_mistake(llm: str, says: str) -> None:
    with pytest.raises(ModelMistake, match=says):
        parse(llm)


def test_one_address_does_not_speak_of_several_models() -> None:
    with pytest.raises(ModelMistake, match="give each as MODEL@URL"):
        parse("a,b", "http://localhost:1/v1")


@pytest.fixture
def made_anew() -> Iterator[None]:
    """Clients are made once a process, by its environment."""
    client.cache_clear()
    yield
    client.cache_clear()


WAYS = {
    "ALL_PROXY": "socks5://127.0.0.1:1",
    "HTTP_PROXY": "no://proxy",
    "SSL_CERT_FILE": "/nobody/knows.pem",
    "http_proxy": "http://127.0.0.1:9",
}


@pytest.mark.usefixtures("made_anew")
@pytest.mark.parametrize(("name", "value"), WAYS.items())
def test_a_way_through_the_environment_that_leads_nowhere_is_named_and_none_of_the_embedded_model(
    name: str, value: str, bench: Bench, sandbox: MontySandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {*map(str.upper, WAYS), "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_DIR"}
    for way in [each for each in os.environ if each.upper() in ways]:
        monkeypatch.delenv(way)
    monkeypatch.setenv(name, value)
    with ChatServer(lambda _: {}) as server:
        with pytest.raises(ModelMistake, match=f"{server.url} does not answer .*see to {name} of the environment"):
            parse("x", server.url).check()
        assert not server.asked
    assert isinstance(propose("embedded", bench, sandbox).outcome, Scored | Rejection)


def test_a_proxy_of_langchain_alone_is_none_of_ours(
    bench: Bench, sandbox: MontySandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_PROXY", "http://127.0.0.1:9")
    with ChatServer(lambda _: proposal("Because.", GOOD)) as server:
        assert isinstance(propose("x", bench, sandbox, base_url=server.url).outcome, Scored)


def test_an_address_that_is_none_is_a_mistake() -> None:
    with pytest.raises(ModelMistake, match=r"http://a\.\.b/v1 does not answer"):
        parse("m@http://a..b/v1").check()


def test_several_models_are_drawn_by_weight_and_by_the_proposal_alone() -> None:
    mixture = parse("openai:a=3, embedded ,http://localhost:1/v1=0.5")
    assert isinstance(mixture, Mixture)
    drawn = [mixture.draw("", seed).spec for seed in range(900)]
    assert drawn == [mixture.draw("p000", seed).spec for seed in range(900)]
    share = Counter(drawn)
    assert 0.6 < share["openai:a"] / 900 < 0.74
    assert 0.16 < share["embedded"] / 900 < 0.29
    assert 0.06 < share["http://localhost:1/v1"] / 900 < 0.17


def test_what_is_local_is_free_and_the_rest_has_the_price_that_is_given() -> None:
    models = parse("ollama:a,embedded,openai:b,vllm:c@https://elsewhere/v1")
    assert priced(models, {"openai:b": (1, 2)}) == {"ollama:a": (0, 0), "embedded": (0, 0), "openai:b": (1, 2)}


def test_an_answer_that_dribbles_in_is_cut_off_and_counts_at_its_reservation(
    bench: Bench, sandbox: MontySandbox
) -> None:
    account = Account(prices={"x": (0.0, 1e6)})
    with ChatServer(lambda _: {}) as server:
        server.dribbles = True
        with pytest.raises(ModelMistake, match=r"the language model failed \(x: no whole answer within 0.3 s\)"):
            propose("x", bench, sandbox, account, base_url=server.url, seconds=0.3, tokens=50)
    spent = account.spent()
    assert (spent.calls, spent.tokens_out, spent.cost) == (1, 50, 50.0)
    assert spent.tokens_in > 1000


def test_a_busy_server_is_tried_again_and_every_try_is_a_call(bench: Bench, sandbox: MontySandbox) -> None:
    script = iter([refusal(429, "busy", retry_after="0"), refusal(500, "oh", retry_after="0"), proposal("So.", GOOD)])
    account = Account(prices={"x": (1e6, 0.0)})
    with ChatServer(lambda _: next(script)) as server:
        attempt = propose("x", bench, sandbox, account, base_url=server.url)
    assert isinstance(attempt.outcome, Scored)
    assert account.spent() == Spent(calls=3, tokens_in=10, tokens_out=5, cost=10)
    assert [answer[:2] for answer in account.answers()] == [("p000", 1)]


def test_an_error_that_repeats_the_key_is_told_without_it(
    bench: Bench, sandbox: MontySandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with (
        ChatServer(lambda _: refusal(400, "you sent sk-secret")) as server,
        pytest.raises(ModelMistake, match=r"400 - you sent \*\*\*") as caught,
    ):
        propose("x", bench, sandbox, base_url=server.url)
    assert server.keys == ["sk-secret"]
    assert "sk-secret" not in str(caught.value)


def test_a_model_of_the_responses_api_is_sent_no_seed_and_yet_told_apart_by_it(
    bench: Bench, sandbox: MontySandbox, tmp_path: Path
) -> None:
    with ChatServer(lambda _: {}) as server:
        server.response = [{"type": "function_call", "id": "f1", "call_id": "c1", "status": "completed"}]
        server.response[0] |= {"name": "Proposal", "arguments": json.dumps({"thought": "So.", "code": GOOD})}
        account = Account(cache=Ledger(tmp_path / "answers.sqlite"))
        proposer = Proposer(parse(f"openai:gpt-6-x@{server.url}"), [bench], sandbox, account=account)
        for name, seed in (("p000", 1), ("p001", 2)):
            attempt = proposer.propose(replace(ASK, name=name, seed=seed), Known({}))
            assert isinstance(attempt.outcome, Scored)
    assert [request.keys() & {"seed", "input", "max_output_tokens"} for request in server.asked] == [
        {"input", "max_output_tokens"}
    ] * 2


@pytest.mark.parametrize("streams", [False, True])
def test_reasoning_goes_back_to_the_server_that_gave_it(streams: bool) -> None:
    thinking: Answer = tool_call("run_code", code=GOOD) | {"reasoning_content": "I wonder."}
    with ChatServer(lambda _: thinking) as server:
        model = LanguageModel("x", server.url)
        chat = model.chat(Conversation(Account(), "p000", "x"), 1, None, streams=streams)
        said = chat.invoke("Go.")
        chat.invoke(["Go.", said, ("user", "On.")])
    assert server.asked[1]["messages"][1]["reasoning_content"] == "I wonder."


def test_an_answer_that_is_known_from_the_account_is_not_asked_for_again(bench: Bench, sandbox: MontySandbox) -> None:
    """As after a kill: the conversation goes on after what was paid for, tools and all."""
    script = iter([tool_call("run_code", code=GOOD), refusal(400, "no more"), proposal("So.", GOOD)])
    account = Account()
    with ChatServer(lambda _: next(script)) as server:
        with pytest.raises(ModelMistake, match="no more"):
            propose("x", bench, sandbox, account, base_url=server.url)
        attempt = propose("x", bench, sandbox, account, base_url=server.url)
    assert isinstance(attempt.outcome, Scored)
    assert (attempt.tokens, attempt.tool_calls) == (30, ("run_code",))
    assert [len(request["messages"]) for request in server.asked] == [2, 4, 4]


GARBLED: Answer = {"role": "assistant", "content": "", "finish_reason": "error"}


@pytest.mark.parametrize("comes", [proposal("Because.", GOOD), GARBLED])
def test_an_interrupt_waits_for_the_answer_and_stays_an_interrupt_whatever_comes(
    comes: Answer, bench: Bench, sandbox: MontySandbox
) -> None:
    def script(_: dict[str, Any]) -> Answer:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # so that it is heard before the answer is there
        return comes

    before, account = signal.signal(signal.SIGINT, signal.default_int_handler), Account()
    try:
        with ChatServer(script) as server, pytest.raises(KeyboardInterrupt):
            propose(f"m@{server.url}", bench, sandbox, account)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(server.asked) == account.spent().calls == 1
    assert len(account.answers()) == ("tool_calls" in comes)
