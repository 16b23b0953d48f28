"""The refiner: a person talks with it about one proxy, and it changes the proxy with them.

What it changes is a list of versions in the graph's state, the last of which counts. To
measure or to accept it must ask: its tools stop in a LangGraph interrupt, whose answer is the
number of measurements that the person allows, this one included.
"""

from __future__ import annotations

import contextvars
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from langchain.agents import AgentState, create_agent
from langchain.agents.middleware import AgentMiddleware, ModelCallLimitMiddleware, ModelRequest, dynamic_prompt
from langchain.tools import ToolRuntime
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool, tool
from langgraph.graph import MessagesState
from langgraph.types import Command, interrupt
from pydantic import BaseModel, ConfigDict

from agents.proposer import Failures
from prompts import render
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import Mistake
from tap_eval.proxies.features import TASK, visible
from tap_eval.proxies.fitness import rank_correlation
from tap_eval.proxies.proxy import Rejection
from tools.evaluation import Measured, Scored, measure, score
from tools.sandbox import Sandbox, published
from tools.toolbox import features_text, layer_table, refusal

T = TypeVar("T")
MODEL_CALLS = 12
"""in answer to one message of the person"""
_ASKING = ("measure", "accept", "try_network")
_ONE_AT_A_TIME = "Ask for one thing at a time that the person has to allow; this was not done."


class Version(BaseModel):
    """A proxy on its way; `name` is that of the candidate that it is, or None while it is not accepted."""

    model_config = ConfigDict(frozen=True)
    thought: str
    code: str
    name: str | None = None


def _latest(_: Any, new: Any) -> Any:
    """Tools that one message calls side by side may both write; the later wins."""
    return new


class RefinementState(AgentState[Any]):
    """A conversation; every value but the messages is plain JSON."""

    versions: Annotated[list[dict[str, Any]], _latest]
    """a `Version` each; the first is the proxy that the conversation began with, the last is the current one"""
    allowance: Annotated[int, _latest]
    """measurements of the proxy as it stands that the person has allowed in advance"""


class Stopped(Exception):
    """The person did not wait for the answer."""


def begin(work: Callable[[], T]) -> Future[T]:
    """Does `work` in a thread of its own, which nobody has to wait for."""
    done: Future[T] = Future()

    def do() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 it is raised where the result is waited for
            done.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=[do], daemon=True).start()
    return done


def await_(done: Future[T], stop: threading.Event) -> T:
    """What comes of it; raises `Stopped` soon after `stop` is set."""
    while not wait([done], timeout=0.1).done:
        if stop.is_set():
            raise Stopped
    return done.result()


class _Stoppable(AgentMiddleware[Any, Any, Any]):
    """Lets go of a model or a tool that is being waited for, once `stop` is set.

    What the model says to nobody is paid for, so it is heard when the same is asked again.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._asked: tuple[list[str], Future[Any]] | None = None

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        messages = [message.model_dump_json() for message in request.messages]
        known, answer = self._asked or ([], None)
        if answer is None or known != messages or (answer.done() and answer.exception()):
            answer = begin(lambda: handler(request))
        self._asked = messages, answer
        found = await_(answer, self._stop)
        self._asked = None
        return found

    def wrap_tool_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        return await_(begin(lambda: handler(request)), self._stop)


class _OneAtATime(AgentMiddleware[Any, Any, Any]):
    """Of the calls of one message that need consent, lets the first alone happen.

    They would run side by side, each with the whole allowance.
    """

    def wrap_tool_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        asked = [call["id"] for call in request.state["messages"][-1].tool_calls if call["name"] in _ASKING]
        call = request.tool_call
        if call["id"] in asked[1:]:
            return ToolMessage(_ONE_AT_A_TIME, tool_call_id=call["id"], name=call["name"])
        return handler(request)


class RefinementInput(MessagesState):
    """What a person sends: a message."""


@dataclass(frozen=True)
class Surroundings:
    """What a conversation is about, the same for all of its messages."""

    benches: Sequence[Bench]
    sandbox: Sandbox
    proxies: Callable[[], Mapping[str, str]]
    """code of the run's living proxies, by name"""
    elsewhere: Callable[[str, str | None, str | None], Bench]
    """another network by its name, image source (None for the run's) and file of weights; raises a `Mistake`"""

    def score(self, code: str) -> Scored | Rejection:
        """See `tools.evaluation.score`."""
        return score(code, self.benches, self.sandbox)

    def measure(self, code: str) -> str:
        """What a proxy achieves, in a line a network, or why it fails."""
        scored = self.score(code)
        return refusal(scored) if isinstance(scored, Rejection) else measured_text(measure(scored, self.benches), self)

    def table(self, code: str, before: str | None = None) -> str:
        """Scores and bits of all layers, beside those that `before` gives them."""
        scored = self.score(code)
        if isinstance(scored, Rejection):
            return refusal(scored)
        old = self.score(before) if before and before != code else None
        beside = None if isinstance(old, Rejection) else old
        return "\n\n".join(
            f"{bench.name}\n\n{layer_table(bench, scored, place, beside)}" for place, bench in enumerate(self.benches)
        )

    def features(self, layer: str) -> str:
        """The features of the layers of that name, or what the names are."""
        return features_text(self.benches, [layer])

    def compare(self, code: str, name: str) -> str:
        """Scores and bits beside those of another proxy of the run, and how alike their rankings are."""
        proxies = self.proxies()
        if name not in proxies:
            return f"there is no living proxy {name}; there are {', '.join(proxies)}."
        one, other = self.score(code), self.score(proxies[name])
        if isinstance(one, Rejection):
            return refusal(one)
        if isinstance(other, Rejection):
            return refusal(other)
        return "\n\n".join(
            f"{bench.name}: rank correlation of the scores {rank_correlation(mine, its):.3f}\n\n"
            f"{layer_table(bench, one, place, other)}"
            for place, (bench, mine, its) in enumerate(zip(self.benches, one.scores, other.scores, strict=True))
        )

    def names(self) -> set[str]:
        """What layers are called by: their names and indices."""
        features = [each for bench in self.benches for each in bench.features]
        return {str(each[kind]) for each in features for kind in ("name", "index")}

    def images(self) -> int:
        """Images that one measurement reads."""
        return sum(bench.compared for bench in self.benches)


def current(state: Mapping[str, Any]) -> Version:
    """The version that counts."""
    return Version(**state["versions"][-1])


def parent(state: Mapping[str, Any]) -> str:
    """Name of the last accepted version: what the next one descends from."""
    return next(str(version["name"]) for version in reversed(state["versions"]) if version["name"])


def consent(question: str) -> int:
    """Stops for the person's answer: measurements allowed, this one included; 0 is no.

    Takes a number, or yes and no in words, as people answer an interrupt in Studio.
    """
    answer = interrupt({"question": question, "answers": "yes, no, or how many measurements you allow"})
    if isinstance(answer, dict):
        answer = answer.get("allow", answer.get("answer", 0))
    words = str(answer).strip().lower()
    return int(words) if words.isdecimal() else int(words in ("yes", "y", "true", "ok"))


def measured_text(found: Measured, surroundings: Surroundings) -> str:
    """Accuracy, divergence and rank correlation, a line a network."""
    return "\n".join(
        f"{bench.name}: {found.told(place)}{f', on {bench.compared:,} search images' if found.count else ''}"
        for place, bench in enumerate(surroundings.benches)
    )


def make_tools(surroundings: Surroundings, accept: Callable[[Version, str], Version]) -> list[BaseTool]:
    """The agent's tools; `accept` makes a version a child of the named candidate and returns it with its own name."""

    def may_measure(runtime: ToolRuntime[Any, Any], what: str) -> int | None:
        """The allowance that is left when this measurement is done, or None when it may not be."""
        allowance = runtime.state["allowance"] or consent(f"Measure {what}? (a number allows that many measurements)")
        return allowance - 1 if allowance else None

    def answer(runtime: ToolRuntime[Any, Any], text: str, **update: Any) -> Command[Any]:
        message = ToolMessage(text, tool_call_id=runtime.tool_call_id)
        return Command(update={"messages": [message], **update})

    @tool
    def run_code(code: str, runtime: ToolRuntime[Any, Any]) -> str:
        """Runs a proxy in the sandbox; shows every layer's score and bits beside those of the proxy as it stands."""
        return surroundings.table(code, current(runtime.state).code)

    @tool
    def show_layers(runtime: ToolRuntime[Any, Any]) -> str:
        """Shows every layer's score and bits from the proxy as it stands."""
        return surroundings.table(current(runtime.state).code)

    @tool
    def show_features(layer: str) -> str:
        """Shows all features of one layer, given by its name or index."""
        return surroundings.features(layer)

    @tool
    def compare(name: str, runtime: ToolRuntime[Any, Any]) -> str:
        """Shows scores and bits beside those of another proxy of the run, given by its name."""
        return surroundings.compare(current(runtime.state).code, name)

    @tool
    def propose(thought: str, code: str, runtime: ToolRuntime[Any, Any]) -> Command[Any]:
        """Makes this the proxy as it stands, if it runs; the person can undo it."""
        scored = surroundings.score(code)
        if isinstance(scored, Rejection):
            return answer(runtime, refusal(scored))
        versions = [*runtime.state["versions"], Version(thought=thought, code=code).model_dump()]
        return answer(runtime, surroundings.table(code, current(runtime.state).code), versions=versions)

    @tool("measure")
    def measure_it(runtime: ToolRuntime[Any, Any]) -> Command[Any]:
        """Quantizes the networks as the proxy says and measures their accuracy, if the person allows it."""
        left = may_measure(runtime, f"the proxy as it stands on {surroundings.images():,} images")
        if left is None:
            return answer(runtime, "The person does not allow it.")
        return answer(runtime, surroundings.measure(current(runtime.state).code), allowance=left)

    @tool("accept")
    def accept_it(runtime: ToolRuntime[Any, Any]) -> Command[Any]:
        """Keeps the proxy as it stands in the run, measured, as a child of the one before, if the person agrees."""
        version = current(runtime.state)
        if version.name:
            return answer(runtime, f"Nothing has changed since {version.name}.")
        if not consent("Keep the proxy as it stands in the run, with its fitness measured?"):
            return answer(runtime, "The person does not want that yet.")
        kept = accept(version, parent(runtime.state))
        versions = [*runtime.state["versions"][:-1], kept.model_dump()]
        return answer(runtime, f"It is kept as {kept.name}.", versions=versions)

    @tool
    def try_network(
        network: str, images: str | None, weights: str | None, runtime: ToolRuntime[Any, Any]
    ) -> Command[Any]:
        """Scores, allocates and measures another network, if the person allows it.

        `network` is named as on the command line: a torchvision classifier, say. `images` is its image
        source, none for those of the run; `weights` is a file of its weights.
        """
        if ":" in network:  # it would import and call what a model names
            return answer(runtime, "A factory can only be named by the person, on the command line.")
        if not re.fullmatch(r"[\w.-]+", network):
            return answer(runtime, f"{network!r} is no name of a network.")
        from_file = f" with the weights in {weights!r}" if weights else ""
        where = repr(images) if images else "the images of the run"
        if not consent(f"Open {network}{from_file}, and measure it on {where}?"):
            return answer(runtime, "The person does not allow it.")
        try:
            bench = surroundings.elsewhere(network, images, weights)
            there = Surroundings([bench], surroundings.sandbox, surroundings.proxies, surroundings.elsewhere)
            code = current(runtime.state).code
            found = f"{there.table(code)}\n\n{there.measure(code)}"
        except Mistake as mistake:
            return answer(runtime, str(mistake))
        return answer(runtime, found)

    return [run_code, show_layers, show_features, compare, propose, measure_it, accept_it, try_network]


def make_agent(
    model: BaseChatModel, surroundings: Surroundings, accept: Callable[[Version, str], Version], stop: threading.Event
) -> Any:
    """The agent as a graph over `RefinementState`; raises `Stopped` soon after `stop` is set."""
    inputs = surroundings.benches[0].task.inputs

    @dynamic_prompt
    def system(request: ModelRequest[Any]) -> str:
        state = cast("RefinementState", request.state)
        versions = state["versions"]
        return render(
            "refinement",
            sandbox=published(),
            features=visible(inputs),
            task=TASK,
            networks=[
                {"name": bench.name, "limited": bench.task.budget.about, **bench.described_task}
                for bench in surroundings.benches
            ],
            version=versions[-1],
            parent=parent(state),
            changes=len(versions) - 1,
        )

    middleware: list[AgentMiddleware[Any, Any, Any]] = [
        system,
        ModelCallLimitMiddleware(run_limit=MODEL_CALLS, exit_behavior="end"),
        _OneAtATime(),
        _Stoppable(stop),
        Failures("say `again`"),
    ]
    return create_agent(
        model,
        make_tools(surroundings, accept),
        middleware=middleware,
        state_schema=RefinementState,
    )
