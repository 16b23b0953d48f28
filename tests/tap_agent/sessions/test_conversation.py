"""Conversations about a proxy of a real run: commands without a model, an agent that must ask, and several at once."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agents.account import Account
from agents.chat import ModelMistake
from agents.refiner import Stopped
from tap_agent.runs.folder import RunFolder, RunMistake
from tap_agent.sessions.conversation import Conversation, make_refinement
from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import NetworkSettings, Settings
from tests.agents.scripted import Answer, ChatServer, refusal, tool_call
from tests.tap_agent.refining_agent import BY_SIZE, BY_STD, LAYERS, agent, results, said, text, words


def test_without_a_model_the_commands_work(run: RunFolder, opened: Callable[..., Any]) -> None:
    with opened() as conversation:
        began = conversation.version
        assert "cannot\nread a question" in words(conversation.say("why is layer 3 so low?"))
        assert LAYERS in words(conversation.say("show"))
        assert '"kind": "depthwise"' in words(conversation.say(f"show {LAYERS}"))
        assert "nothing to undo" in words(conversation.say("undo"))
        assert "error: " in words(conversation.say("use\ndef sensitivity(layers, task):\n    return 1 / 0"))
        assert "weight_std" in words(conversation.say(f"use\n```python\n{BY_STD}```"))
        assert "+    return" in words(conversation.say("diff"))
        assert "search images" in words(conversation.say("measure"))
        assert "Kept as c000, a child of" in words(conversation.say("accept"))
        assert "Nothing has changed" in words(conversation.say("accept"))
        assert conversation.version.name == "c000"
        assert "c000 stays in the run" in words(conversation.say("undo"))
        assert conversation.version == began
    result = run.result()
    assert result
    (child,) = result.refinements
    assert (child.parents, child.code, child.template) == ([began.name], BY_STD, "refinement")
    assert child.fitness is not None
    assert (run.path / "proxies" / "c000.py").read_text().endswith(BY_STD)
    assert "c000" in run.report.read_text()
    assert run.events()[-1]["event"] == "refined"


def test_the_agent_looks_changes_and_asks_before_it_measures_or_accepts(
    run: RunFolder, opened: Callable[..., Any]
) -> None:
    with Account(run.calls) as account:
        before = account.spent()
    with ChatServer(agent) as server, opened(server.url) as conversation:
        parts = list(conversation.say("why is it so low?"))
        assert [part.text for part in parts if part.kind == "call"] == ["show_features"]
        assert len([part for part in parts if part.kind == "words"]) > 5  # it streams
        assert '"kind": "depthwise"' in words(iter(parts))
        system = server.asked[0]["messages"][0]["content"]
        assert conversation.version.code.strip() in system

        assert "score before" in words(conversation.say("change it"))
        assert conversation.version.code == BY_STD
        assert "error" in words(conversation.say("break it"))
        assert conversation.version.code == BY_STD

        list(conversation.say("measure it"))
        (question,) = conversation.questions
        assert "320 images" in question.text  # at two budgets
        assert "does not allow" in words(conversation.answer({question.identity: "no"}))
        list(conversation.say("measure it"))
        (question,) = conversation.questions
        assert "search images" in words(conversation.answer({question.identity: "2"}))
        assert "search images" in words(conversation.say("measure it again"))  # the second of the two allowed
        assert not conversation.questions
        list(conversation.say("elsewhere"))
        (question,) = conversation.questions
        assert question.text == "Open digits, and measure it on the images of the run?"
        assert "search images" in words(conversation.answer({question.identity: "yes"}))
        list(conversation.say("nowhere"))
        (question,) = conversation.questions
        assert "no_such_net" in words(conversation.answer({question.identity: "yes"}))
        assert "only be named by the person" in words(conversation.say("import it"))
        assert not conversation.questions
        assert "rank correlation of the scores" in words(conversation.say("compare it"))

        list(conversation.say("keep it"))
        (question,) = conversation.questions
        assert not run.result().refinements  # type: ignore[union-attr]
        assert "kept as c000" in words(conversation.answer({question.identity: "yes"}))
        assert conversation.version.name == "c000"
    assert [each.name for each in run.result().refinements] == ["c000"]  # type: ignore[union-attr]
    with Account(run.calls) as account:
        after = account.spent()
    assert after.calls - before.calls == len(server.asked)
    assert after.tokens_in - before.tokens_in == 10 * len(server.asked)


def test_a_conversation_goes_on_in_another_process_and_after_a_broken_connection(opened: Callable[..., Any]) -> None:
    broken = [True]

    def once_broken(request: dict[str, Any]) -> Answer:
        if said(request).startswith("measure") or not broken:
            return agent(request)
        broken.clear()
        return {"role": "assistant", "content": None, "broken": True}

    with ChatServer(once_broken) as server:
        with opened(server.url) as conversation:
            list(conversation.say("measure it"))
            assert conversation.questions
        with opened(server.url) as conversation:  # as after a kill: the question is still there
            (question,) = conversation.questions
            assert "search images" in words(conversation.answer({question.identity: "yes"}))
            assert len(conversation.messages) == 4
        with opened(server.url) as conversation:
            with pytest.raises(Exception, match="the language model failed"):
                list(conversation.say("change it"))
            assert conversation.unanswered
        with opened(server.url) as conversation:
            assert conversation.unanswered
            assert "score before" in words(conversation.again())
            assert conversation.version.code == BY_STD
            assert [message.type for message in conversation.messages].count("human") == 2


def test_a_sentence_that_begins_like_a_command_is_for_the_agent(opened: Callable[..., Any]) -> None:
    with ChatServer(lambda request: text("Yes.")) as server, opened(server.url) as conversation:
        for sentence in ("use the kurtosis instead", "show layers that are deep", "show weights", "measure it twice"):
            assert words(conversation.say(sentence)) == "Yes."
        assert len(server.asked) == 4
        assert '"index": 0' in words(conversation.say("show 0"))
        assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (text(""), "The model's answer was empty."),
        (text("It is") | {"finish_reason": "length"}, "It is.*The answer was cut off .* raise answer_tokens"),
        (text("") | {"finish_reason": "content_filter"}, "content filter withheld the answer"),
        (text("") | {"refusal": "I cannot."}, "The model refused: I cannot.$"),
        (text("<think>So wide!</think>It is wide."), "^It is wide.$"),
        (
            {**tool_call("propose", thought="x", code="cut"), "finish_reason": "length", "cut": True},
            "The answer was cut off",
        ),
    ],
)
def test_a_person_is_told_why_an_answer_says_nothing(answer: Answer, told: str, opened: Callable[..., Any]) -> None:
    if answer.pop("cut", False):
        answer["tool_calls"][0]["function"]["arguments"] = '{"thought": "x", "code": "def sensitivity(la'
    with ChatServer(lambda _: dict(answer)) as server, opened(server.url) as conversation:
        began = conversation.version
        assert re.search(told, words(conversation.say("why?")), re.S)
        assert all(message.text or message.type == "human" for message in conversation.messages)
        assert conversation.version == began


def test_a_call_in_words_is_done_and_a_refused_parameter_told(opened: Callable[..., Any]) -> None:
    call = json.dumps({"name": "propose", "arguments": {"thought": "By spread.", "code": f"```\n{BY_STD}```"}})

    def plain(request: dict[str, Any]) -> Answer:
        if "seed" in request:
            return refusal(422, "seed: extra fields not permitted")
        return text("Done.") if results(request) else text(f"<tool_call>{call}</tool_call>")

    with ChatServer(plain) as server, opened(server.url) as conversation:
        said = words(conversation.say("change it"))
        assert "Done." in said
        assert "scripted refuses seed, which is left out from now on." in said
        assert conversation.version.code == BY_STD
        assert ["seed" in request for request in server.asked] == [True, False, False]
        assert "refuses" not in words(conversation.say("again, please"))


def test_one_allowance_is_not_used_by_two_calls_of_one_message(opened: Callable[..., Any]) -> None:
    def greedy(request: dict[str, Any]) -> Answer:
        done = results(request)
        if done:
            return text(" ".join(done))
        calls = [tool_call("measure")["tool_calls"][0] | {"id": f"c{place}"} for place in range(3)]
        return {"role": "assistant", "content": None, "tool_calls": calls}

    with ChatServer(greedy) as server, opened(server.url) as conversation:
        list(conversation.say("go on"))
        (question,) = conversation.questions
        said = words(conversation.answer({question.identity: "2"}))
        assert said.count("search images") == 2
        assert said.count("one thing at a time") == 2


def test_what_was_done_before_a_break_stays(run: RunFolder, opened: Callable[..., Any]) -> None:
    def breaks(request: dict[str, Any]) -> Answer:
        if not results(request):
            return tool_call("propose", thought="By spread.", code=BY_STD)
        return {"role": "assistant", "content": "It is now by the", "broken": True}

    with ChatServer(breaks) as server, opened(server.url) as conversation:
        with pytest.raises(Exception, match="cut off"):
            list(conversation.say("change it"))
        assert conversation.unanswered
        assert "weight_std" in words(conversation.say("diff"))
        assert conversation.version.code == BY_STD
        assert "Kept as c000" in words(conversation.say("accept"))
        version, parent = conversation.version, conversation.before
        assert parent
        kept = conversation._refinement.accept(version, str(parent.name))  # as after a kill in the middle
        assert kept.name == "c000"
    result = run.result()
    assert result
    assert [each.name for each in result.refinements] == ["c000"]


def test_commands_need_no_model(opened: Callable[..., Any]) -> None:
    with opened("http://127.0.0.1:9/v1") as conversation:
        assert LAYERS in words(conversation.say("show"))
        with pytest.raises(ModelMistake, match="does not answer"):
            list(conversation.say("why?"))
        assert conversation.unanswered
        assert "nothing to undo" in words(conversation.say("undo"))


def test_a_person_need_not_wait_for_the_model(opened: Callable[..., Any]) -> None:
    asked, released = threading.Event(), threading.Event()

    def slow(request: dict[str, Any]) -> Answer:
        if not released.is_set():
            asked.set()
            released.wait(30)
        return text("At last.")

    with ChatServer(slow) as server, opened(server.url) as conversation:
        threading.Thread(target=lambda: (asked.wait(30), conversation.stop())).start()
        with pytest.raises(Stopped):
            list(conversation.say("why?"))
        assert conversation.unanswered
        assert not released.is_set()
        released.set()
        assert words(conversation.again()) == "At last."


def test_state_is_plain_json_but_for_the_messages(opened: Callable[..., Any]) -> None:
    with opened() as conversation:
        list(conversation.say(f"use\n{BY_SIZE}"))
        state = {name: value for name, value in conversation._state.items() if name != "messages"}
        assert json.loads(json.dumps(state)) == state


def test_two_cannot_answer_at_once(opened: Callable[..., Any]) -> None:
    with ChatServer(agent) as server, opened(server.url) as first, opened(server.url) as second:
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
        resources = stack.enter_context(Resources(run.settings(), cache))
        living = (each.name for each in result.candidates if each.failure is None and each.name != result.best)
        proxies = [result.best, next(living)]
        both = [stack.enter_context(Conversation(run, name, resources)) for name in proxies]
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


NAMED = """
from torch import nn

class Named(nn.Sequential):
    def forward(self, x):
        return {"logits": super().forward(x), "other": x.flatten(1)[:, :10]}

def network():
    return Named(nn.Flatten(), nn.Linear(64, 10))
"""


def test_the_output_that_is_named_is_that_of_the_runs_own_network(
    run: RunFolder, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "named_output.py").write_text(NAMED)
    monkeypatch.syspath_prepend(tmp_path)
    own = NetworkSettings(network="named_output:network", output="logits", search=60, test=60)
    with Resources(Settings(networks=(own,), calibration_draws=1), cache) as resources, Account() as account:
        elsewhere = make_refinement(run, "p000", resources, account).surroundings.elsewhere
        assert elsewhere("digits", None, None).prepared.output.place == ""
        assert elsewhere(own.network, None, None).prepared.output.place == "logits"
