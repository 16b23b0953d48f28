"""The refinement graph: a conversation about one proxy, answered by commands or by the agent.

`show`, `diff`, `undo`, `measure`, `accept`, `use` and `help` work without a language model. All
else goes to the agent, whose tools stop for consent; a model that only decodes under a grammar
cannot converse, which is said.
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langgraph.graph import END, START, StateGraph

from agents.reading import code as given_code
from agents.reading import fault, notes
from agents.refiner import (
    RefinementInput,
    RefinementState,
    Surroundings,
    Version,
    await_,
    begin,
    current,
    make_agent,
    parent,
)
from graphs.judge import Judge
from graphs.state import Bits, Candidate
from tap_eval.proxies.proxy import Rejection
from tools.toolbox import refusal

HELP = """\
show          the proxy as it stands, with every layer's score and bits
show LAYER    the features of one layer, by its name or index
diff          what has changed since the accepted version before
undo          back to the version before
measure       its accuracy on the search images
accept        keep it in the run as a child of what it goes back to, with its own fitness
use CODE      your own code, in full, as the next version"""
UNABLE = f"""\
The embedded language model writes formulas under a grammar, and a replay repeats what was recorded: such a model cannot
read a question, reason about layers or change code on request. Take one that converses, with --llm and --base-url.
These work without one:

```
{HELP}
```"""
_COMMANDS = re.compile(r"\s*(show|diff|undo|measure|accept|help|use)(?:(?<=show)[ \t]+(\S+)|(?<=use)\s+(.+))?\s*", re.S)
_UNNAMED = "a draft"
_LAYER = re.compile(r"[\d._]")
"""what a name has that is no word; a layer of another name is looked up"""


@dataclass(frozen=True)
class Run:
    """The run that a conversation belongs to."""

    proxy: str
    """name of the candidate that it begins with"""
    candidates: Callable[[], Mapping[str, Candidate]]
    """by name, those that conversations added too"""
    adopt: Callable[[Candidate], Candidate]
    """adds a judged candidate to the run for good, and gives it the name that it has there"""


class Refinement:
    """The nodes of the graph; what they work on is opened when it is first needed."""

    def __init__(
        self, open_surroundings: Callable[[], Surroundings], open_model: Callable[[], BaseChatModel | None],
        judge: Callable[[], Judge], run: Run,
    ) -> None:  # fmt: skip
        """`open_model` gives None where no model can converse; it may raise a `Mistake`."""
        self._open_surroundings = open_surroundings
        self._open_model = open_model
        self._open_judge = judge
        self._run = run
        self.stop = threading.Event()
        """set while nobody waits for the answer"""

    @cached_property
    def surroundings(self) -> Surroundings:
        """What the conversation is about."""
        return self._open_surroundings()

    @cached_property
    def _agent(self) -> Any:
        model = self._open_model()
        return model and make_agent(model, self.surroundings, self.accept, self.stop)

    def begin(self, state: RefinementState) -> dict[str, Any]:
        """The proxy that the conversation is about, when it begins."""
        return {} if state.get("versions") else start(self._run.candidates()[self._run.proxy])

    def route(self, state: RefinementState) -> Literal["command", "agent"]:
        """Whether the person's last message is a command, rather than a sentence that begins like one."""
        found = _COMMANDS.fullmatch(_said(state))
        if found is None:
            return "agent"
        _, layer, code = found.groups()
        sentence = (code and "def " not in code) or (
            layer and not _LAYER.search(layer) and layer not in self.surroundings.names()
        )
        return "agent" if sentence else "command"

    def command(self, state: RefinementState) -> dict[str, Any]:
        """Does what the person's last message says, which is their consent too."""
        found = _COMMANDS.fullmatch(_said(state))
        assert found
        word, layer, code = found.groups()
        text, versions = await_(begin(lambda: self._done(word, layer, code, state)), self.stop)
        update: dict[str, Any] = {"messages": [AIMessage(text)]}
        return update if versions is None else update | {"versions": versions}

    def _done(
        self, word: str, layer: str | None, code: str | None, state: RefinementState
    ) -> tuple[str, list[dict[str, Any]] | None]:
        """What a command answers, and the versions where it changes them."""
        versions, version = state["versions"], current(state)
        match word:
            case "show" if layer:
                return self.surroundings.features(layer), None
            case "show":
                fence = f"```python\n{version.code.strip()}\n```"
                return f"{version.thought}\n\n{fence}\n\n{self.surroundings.table(version.code)}", None
            case "diff":
                return self._difference(versions), None
            case "undo" if len(versions) > 1:
                stays = f" {version.name} stays in the run." if version.name else ""
                return f"Back to {versions[-2]['name'] or 'the version before'}.{stays}", versions[:-1]
            case "undo":
                return f"The conversation began with {version.name}; there is nothing to undo.", None
            case "measure":
                return self.surroundings.measure(version.code), None
            case "accept" if version.name:
                return f"Nothing has changed since {version.name}.", None
            case "accept":
                kept = self.accept(version, parent(state))
                return self._accepted(kept), [*versions[:-1], kept.model_dump()]
            case "use" if code:
                return self._used(code, versions)
            case _:
                return f"```\n{HELP}\n```\n\nAnything else is said to the agent.", None

    def _used(self, code: str, versions: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]] | None]:
        code = given_code(code).strip() + "\n"
        scored = self.surroundings.score(code)
        if isinstance(scored, Rejection):
            return refusal(scored), None
        if code.strip() == versions[-1]["code"].strip():
            return "That is the proxy as it stands.", None
        changed = [*map(dict, versions), Version(thought="Written by hand.", code=code).model_dump()]
        return f"{self._difference(changed)}\n\n{self.surroundings.table(code, versions[-1]['code'])}", changed

    @staticmethod
    def _difference(versions: Sequence[Mapping[str, Any]]) -> str:
        """The current code against that of the last accepted version before it."""
        named = [version for version in versions[:-1] if version["name"]] or versions[:1]
        new, old = versions[-1], named[-1]
        lines = difflib.unified_diff(
            old["code"].strip().splitlines(), new["code"].strip().splitlines(), old["name"], new["name"] or "now",
            lineterm="",
        )  # fmt: skip
        text = "\n".join(lines)
        return f"```diff\n{text}\n```" if text else f"Nothing has changed since {old['name']}."

    def accept(self, version: Version, descends: str) -> Version:
        """Judges a version as the search would, and adds it to the run as a child of the candidate `descends`."""
        everyone = dict(self._run.candidates())
        scored = self.surroundings.score(version.code)
        if isinstance(scored, Rejection):  # it ran when it became a version
            raise RuntimeError(f"{descends} cannot be followed: {refusal(scored)}")
        child = Candidate(
            name=_UNNAMED,
            generation=everyone[descends].generation + 1,
            template="refinement",
            parents=[descends],
            thought=version.thought,
            code=version.code,
            scores=[list(scores) for scores in scored.scores],
            prints=list(scored.prints),
            allocations=[Bits.of(allocation) for allocation in scored.allocations],
        )
        judged = self._open_judge().judge([_UNNAMED], everyone | {_UNNAMED: child}, [])[_UNNAMED]
        return version.model_copy(update={"name": self._run.adopt(judged).name})

    def _accepted(self, kept: Version) -> str:
        everyone = self._run.candidates()
        child = everyone[str(kept.name)]
        (before,) = (everyone[name] for name in child.parents)
        top1 = ", ".join(f"{100 * value:.1f} %" for value in child.top1)
        measured = f", search accuracy {top1}" if top1 else ""
        return (
            f"Kept as {child.name}, a child of {before.name}: fitness {child.value:.4f} ({before.value:.4f} before)"
            f"{measured}."
        )

    def agent(self, state: RefinementState) -> dict[str, Any]:
        """The agent's answer, or that there is none that could answer."""
        if self._agent is None:
            return {"messages": [AIMessage(UNABLE)]}
        answered: dict[str, Any] = self._agent.invoke(state)
        messages = _told(answered["messages"], len(state["messages"]))
        return {"messages": messages, **{name: answered[name] for name in ("versions", "allowance")}}

    def graph(self, context: type | None = None) -> StateGraph[RefinementState, Any, RefinementInput]:
        """The state machine, not compiled: the caller brings the checkpointer.

        `context` is what a server may be given with a message, for it to show and to check.
        """
        graph = StateGraph(RefinementState, context, input_schema=RefinementInput)
        graph.add_node("begin", self.begin)
        graph.add_node("command", self.command)
        graph.add_node("agent", self.agent)
        graph.add_edge(START, "begin")
        graph.add_conditional_edges("begin", self.route)
        graph.add_edge("command", END)
        graph.add_edge("agent", END)
        return graph


def start(candidate: Candidate) -> dict[str, Any]:
    """The state with which a conversation about a candidate begins."""
    version = Version(thought=candidate.thought, code=candidate.code, name=candidate.name)
    return {"versions": [version.model_dump()], "allowance": 0}


def _told(messages: list[BaseMessage], before: int) -> list[BaseMessage]:
    """With what the person is to know of those since `before`: how they were asked for, and why there is no more."""
    why = fault(messages)
    words = [*notes(messages[before:]), *([f"{why[0].upper()}{why[1:]}"] if why else [])]
    unsaid = bool(why) and str(messages[-1].text).strip() in why
    told: list[BaseMessage] = [AIMessage("\n\n".join(words))] if words else []
    return [*(messages[:-1] if unsaid else messages), *told]


def _said(state: Mapping[str, Any]) -> str:
    last = state["messages"][-1]
    return str(last.text) if isinstance(last, HumanMessage) else ""
