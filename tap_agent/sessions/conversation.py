"""One conversation about a proxy of a finished run, kept in the run's folder, a thread a proxy."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.types import Command

from agents import account as calls
from agents.refiner import Surroundings, Version, current
from graphs.judge import Judge
from graphs.refinement import Refinement, Run, start
from graphs.state import Candidate
from tap_agent.report import html
from tap_agent.runs import checkpoints
from tap_agent.runs.folder import RunFolder, RunMistake
from tap_agent.runs.mending import check_calls
from tap_agent.runs.result import Result
from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import NetworkSettings, Settings
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import Mistake
from tap_eval.proxies.proxy import Rejection
from tools.evaluation import Scored

_PATIENCE = 10.0  # seconds that accepting waits for another conversation which accepts
_LOST = "put it back from a copy, or move it away: what was said is then lost, and what was accepted is in the run"


class NameMistake(Mistake):
    """A proxy that the run does not have, or a name that several have."""

    kind = "proxy"


@dataclass(frozen=True)
class Part:
    """A piece of what is being said: words of the answer, the name of a tool that is called, or what it gave."""

    kind: Literal["words", "call", "result"]
    text: str


@dataclass(frozen=True)
class Question:
    """What the graph has stopped to ask."""

    identity: str
    text: str


class Conversation(AbstractContextManager["Conversation"]):
    """Sends what the person says, and gives back the answer while it comes; goes on where it was."""

    def __init__(self, folder: RunFolder, proxy: str, resources: Resources) -> None:
        """`proxy` is the name of a living candidate; raises `NameMistake`, and `DamagedMistake` of the run's files.

        The settings of `resources` are to be `unlimited`.
        """
        checkpoints.check(folder.conversations, _LOST)
        check_calls(folder)
        candidate = pick(folder.finished(), proxy)
        name = candidate.name
        self._folder = folder
        self._start = start(candidate)
        self._held = ExitStack()
        self._account = self._held.enter_context(resources.account(folder.calls))
        self._saver = self._held.enter_context(checkpoints.opened(folder.conversations))
        self._refinement = make_refinement(folder, name, resources, self._account)
        self._graph = self._refinement.graph().compile(checkpointer=self._saver)
        self._thread = str(uuid.uuid5(uuid.NAMESPACE_URL, f"tap-agent:{folder.identity()}/{name}"))
        self._config: RunnableConfig = {"configurable": {"thread_id": self._thread}}

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def messages(self) -> list[BaseMessage]:
        """What has been said so far."""
        found: list[BaseMessage] = self._state.get("messages", [])
        return found

    @property
    def version(self) -> Version:
        """The proxy as it stands."""
        state = self._state
        return current(state if state.get("versions") else self._start)

    @property
    def before(self) -> Version | None:
        """The last accepted version before the one as it stands."""
        versions = [Version(**version) for version in self._state.get("versions", [])[:-1]]
        return next((version for version in reversed(versions) if version.name), None)

    def score(self, version: Version) -> Scored | Rejection:
        """What a version makes of the networks of the run."""
        return self._refinement.surroundings.score(version.code)

    @property
    def unanswered(self) -> bool:
        """Whether the last message was cut off: by an interruption or by a failure."""
        return bool(self._graph.get_state(self._config).next) and not self.questions

    @property
    def questions(self) -> list[Question]:
        """What the graph waits for."""
        found = self._graph.get_state(self._config).interrupts
        return [Question(each.id, str(each.value["question"])) for each in found]

    @property
    def spent(self) -> calls.Spent:
        """What the run has spent on language models, in its search and in its conversations."""
        return self._account.spent()

    @property
    def step(self) -> str:
        """Differs from what it was once the conversation has gone on, wherever that was."""
        return str(self._graph.get_state(self._config).config["configurable"].get("checkpoint_id"))

    def say(self, text: str) -> Iterator[Part]:
        """The answer to a message; of one before that was cut off, what was done stays done."""
        return self._stream({"messages": [{"role": "user", "content": text}]}, begins=True)

    def answer(self, answers: Mapping[str, str]) -> Iterator[Part]:
        """What follows from the person's answers, by the identity of the question; raises `RunMistake`."""
        if not answers.keys() <= {question.identity for question in self.questions}:
            raise RunMistake("that question is no longer open: it was answered elsewhere.")
        return self._stream(Command(resume=dict(answers)))

    def again(self) -> Iterator[Part]:
        """The rest of an answer that was cut off."""
        return self._stream(None)

    def stop(self) -> None:
        """Lets go of an answer that another thread, or this one, is waiting for; that raises `Stopped`."""
        self._refinement.stop.set()

    @property
    def _state(self) -> dict[str, Any]:
        return self._graph.get_state(self._config).values

    def _keep(self) -> None:
        """Ends an answer that was cut off where it stands, without the calls of tools that have no result."""
        for task in self._graph.get_state(self._config).tasks:
            place = {"thread_id": self._thread, "checkpoint_ns": f"{task.name}:{task.id}"}
            if task.name == "agent" and (reached := self._saver.get_tuple({"configurable": place})):
                state = reached.checkpoint["channel_values"]
                if "messages" not in state:  # it had hardly begun
                    continue
                done = {name: state[name] for name in ("messages", "versions", "allowance")}
                while isinstance(done["messages"][-1], AIMessage) and done["messages"][-1].tool_calls:
                    done["messages"] = done["messages"][:-1]
                self._graph.update_state(self._config, done, as_node="agent")

    def _stream(self, given: Any, begins: bool = False) -> Iterator[Part]:
        self._refinement.stop.clear()
        with self._folder.conversing(self._thread):
            if begins:
                self._keep()
            said: Iterator[Any] = self._graph.stream(
                given, self._config, stream_mode="messages", subgraphs=True, durability="sync"
            )
            for _, (message, _) in said:
                if isinstance(message, ToolMessage):
                    yield Part("result", str(message.text))
                elif isinstance(message, AIMessage):
                    calls = message.tool_call_chunks if isinstance(message, AIMessageChunk) else message.tool_calls
                    yield from (Part("call", str(call["name"])) for call in calls if call["name"])
                    if message.text:
                        yield Part("words", str(message.text))


def make_refinement(folder: RunFolder, proxy: str, resources: Resources, account: calls.Account) -> Refinement:
    """The refinement graph about a proxy of a run, by its name, over the networks of the run."""

    def chat_model() -> BaseChatModel | None:
        model = next((each for each in resources.models.members if not each.small), None)
        if model is None:
            return None
        model.check()
        asking = calls.Conversation(account, f"{calls.CHAT}{proxy}", model.spec)
        return model.chat(asking, time.time_ns(), None, streams=True)

    def candidates() -> dict[str, Candidate]:
        result = folder.finished()
        return {each.name: each for each in (*result.candidates, *result.refinements)}

    def adopt(child: Candidate) -> Candidate:
        with folder.held(_PATIENCE):
            result = folder.finished()
            for known in result.refinements:  # as after a kill before the conversation could write it down
                if (known.code, known.parents) == (child.code, child.parents):
                    return known
            child = child.model_copy(update={"name": f"c{len(result.refinements):03d}"})
            update = {"refinements": [*result.refinements, child], "spent": account.spent()}
            result = result.model_copy(update=update)
            folder.record({"event": "refined", **child.model_dump(mode="json", exclude={"prints"})})
            folder.extend(result, html.render(result))
            return child

    def elsewhere(network: str, images: str | None, weights: str | None) -> Bench:
        own = resources.settings.networks[0]
        its = {"budget", "weights_entry"} | ({"output"} if network != own.network else set())
        where = own.model_dump(exclude=its) if images is None else {"images": images}
        settings = NetworkSettings.model_validate({**where, "network": network, "weights": weights})
        return resources.bench(settings, network)

    def surroundings() -> Surroundings:
        return Surroundings(
            resources.benchmark,
            resources.sandbox,
            lambda: {name: each.code for name, each in candidates().items() if each.failure is None},
            elsewhere,
        )

    return Refinement(
        surroundings,
        chat_model,
        lambda: Judge(resources.benchmark, resources.search_settings().fitness),
        Run(proxy, candidates, adopt),
    )


def unlimited(settings: Settings) -> Settings:
    """For a conversation: the limits of a run do not stop a person."""
    return settings.model_copy(update={"max_cost": None, "max_calls": None, "max_minutes": None})


def pick(result: Result, name: str) -> Candidate:
    """The living candidate of that name, or in whose name alone it is; raises `NameMistake`."""
    living = [each for each in (*result.candidates, *result.refinements) if each.failure is None]
    found = [each for each in living if each.name == name] or [each for each in living if name in each.name]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(each.name for each in found)
        raise NameMistake(f"'{name}' is ambiguous: it may be {names}; give one of them.")
    raise NameMistake(
        f"{result.run} has no living proxy '{name}': there are {', '.join(each.name for each in living)}."
    )
