"""The agents that write proxies: one tool-calling agent a template, with bounded repair.

An agent drafts, may run code in the sandbox and measure within its allowance, and submits a
`Proposal`. What it submits is scored at once; a failure or a duplicate goes back to it with
the reason, for as many rounds as it has.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelCallLimitMiddleware, hook_config
from langchain.agents.structured_output import ToolStrategy
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    ToolMessage,
    convert_to_openai_messages,
)
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import BaseTool
from pydantic import BaseModel, Field

from agents.account import Account, Conversation, Stopping
from agents.answer import SUBMIT
from agents.assignment import Assignment
from agents.briefing import briefing
from agents.chat import ModelMistake, reason
from agents.forecast import Forecast
from agents.models import Models
from agents.prior import Prior
from agents.reading import fault, notes
from prompts import expression, grammar, render
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import Mistake
from tap_eval.proxies.fitness import FitnessWeights
from tap_eval.proxies.proxy import Failure, Proxy, Rejection
from tap_eval.storage import trouble
from tools.evaluation import Known, Scored, score
from tools.sandbox import Sandbox
from tools.toolbox import Draft, make_tools

_APART: RunnableConfig = {"configurable": {"thread_id": "proposal"}, "max_concurrency": 1}
"""A thread of its own keeps an agent out of the search's checkpoints: one that was cut short begins again, and has
its answers from the account. The tools that one message calls run in its order, as who is measured depends on it."""
NEXT_STEP = "resume the run"
_SILENT = "the model submitted no proposal."
FEATURES_DRAWN = 9
"""features that a small model is offered at a time"""
_EXPRESSIONS_OFFERED = 3


class Asking(AgentMiddleware[Any, Any, Any]):
    """Asks the chat model that an agent is invoked with, so that one agent serves many."""

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(request.override(model=request.runtime.context))


class Failures(AgentMiddleware[Any, Any, Any]):
    """Names the language model as what failed, whatever its client makes of a bad answer or of none."""

    def __init__(self, next_step: str) -> None:
        self._next_step = next_step

    def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        with naming_failures(self._next_step):
            return handler(request)

    @hook_config(can_jump_to=["end"])
    def after_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Ends at an answer that calls nothing: an agent without tools would ask again until one does."""
        last = state["messages"][-1]
        return {"jump_to": "end"} if isinstance(last, AIMessage) and not last.tool_calls else None


@contextmanager
def naming_failures(next_step: str) -> Iterator[None]:
    """Raises `ModelMistake` of whatever a call of a language model raises that is no sentence yet, nor of the disk."""
    try:
        yield
    except (Mistake, Stopping):
        raise
    except Exception as error:
        if trouble(error):
            raise
        raise ModelMistake(f"the language model failed ({reason(error)}): see to it, then {next_step}.") from error


class Proposal(BaseModel):
    """Submit a proxy."""

    thought: str = Field(description="The reasoning behind the proxy, in plain language, a few sentences.")
    code: str = Field(description="Complete Python code that defines sensitivity(layers, task).")


@dataclass(frozen=True)
class Attempt:
    """What an agent came up with: a scored proxy, or the rejection of its last try."""

    proxy: Proxy
    outcome: Scored | Rejection
    llm: str
    """the language model that was asked"""
    rounds: int
    tokens: int
    tool_calls: tuple[str, ...]
    conversation: tuple[dict[str, Any], ...]
    """every message but the system's, as OpenAI writes them"""
    seconds: float
    notes: tuple[str, ...] = ()
    """what the user is to know of how the model had to be asked"""
    drafts: tuple[Draft, ...] = ()
    """what it measured on the way, in the order of its asking"""


@dataclass(frozen=True)
class Proposer:
    """The agents' surroundings, the same for every assignment."""

    models: Models
    benches: Sequence[Bench]
    sandbox: Sandbox
    rounds: int = 3
    """proposals an agent may submit before it is given up"""
    allowance: int = 1
    """measurements an agent may ask for"""
    model_calls: int = 8
    """model calls in one round"""
    account: Account = field(default_factory=Account)
    fitness: FitnessWeights = FitnessWeights()
    seed: int = 0
    """of the baselines that agents are told of"""

    @cached_property
    def briefing(self) -> str:
        """What every agent is told first; see `agents.briefing`."""
        return briefing(self.benches, self.fitness, self.allowance, self.seed)

    @cached_property
    def _forecast(self) -> Forecast:
        return Forecast([bench.features for bench in self.benches], Prior(self.benches, self.fitness))

    def propose(self, assignment: Assignment, known: Known) -> Attempt:
        """Runs one agent to the end; its failures come back as a `Rejection`, the machinery's raise.

        A large model repairs what it submitted, in one conversation. A small one cannot: each
        of its rounds starts afresh, under a grammar drawn anew.
        """
        started = time.perf_counter()
        model = self.models.draw(assignment.name, assignment.seed)
        conversation = Conversation(self.account, assignment.name, model.spec)
        parents = {parent.name: parent.measured for parent in assignment.parents}
        drafts: list[Draft] = []
        if model.small:
            agent = _small_agent(self.model_calls)
        else:
            toolbox = make_tools(self.benches, self.sandbox, self.allowance, parents, drafts)
            agent = _agent(self.model_calls, toolbox, self.briefing)
        proxy = Proxy("", "")
        outcome: Scored | Rejection = Rejection(Failure.UNPARSABLE, _SILENT)
        found = outcome
        messages: list[BaseMessage] = []
        said: list[BaseMessage] = []
        rounds = 0
        while rounds < self.rounds and isinstance(found, Rejection):
            if rounds == 0 or model.small:
                rng = random.Random(f"{assignment.seed}/{rounds}")
                names = grammar.features(
                    self.benches[0].task.inputs, FEATURES_DRAWN, rng, self.benches[0].task.choices.channel_groups > 1
                )
                sentences = self._grammar(assignment, names, rng) if model.small else None
                chat = model.chat(conversation, assignment.seed + rounds, sentences)
                messages = [
                    HumanMessage(
                        _ask_small(assignment, names)
                        if model.small
                        else assignment.question([bench.name for bench in self.benches])
                    )
                ]
            else:
                messages.append(HumanMessage(render("repair", failure=found.failure, message=found.message)))
            rounds += 1
            answer = agent.invoke({"messages": messages}, _APART, context=chat)
            said += answer["messages"][len(messages) - 1 :]
            messages = list(answer["messages"])
            proposal = answer.get("structured_response")
            if isinstance(proposal, Proposal):
                proxy = Proxy(proposal.thought, proposal.code)
                outcome = found = score(proxy.code, self.benches, self.sandbox, known)
            else:
                found = Rejection(Failure.UNPARSABLE, fault(messages) or _SILENT)
                outcome = outcome if proxy.code else found
        return Attempt(
            proxy,
            outcome,
            model.spec,
            rounds,
            _tokens(said),
            _tool_calls(said),
            tuple(convert_to_openai_messages(said, text_format="string")),
            time.perf_counter() - started,
            tuple(notes(said)),
            tuple({draft.code: draft for draft in drafts}.values()),
        )

    def _grammar(self, assignment: Assignment, names: Sequence[str], rng: random.Random) -> str:
        """Of the sentences that a small model may answer with."""
        known = [each or "" for each in _expressions(assignment)]
        template = _written(assignment)
        if template == "initialization":
            return grammar.initialization(names, rng)
        made = (
            expression.mutations(known[0], names, rng)
            if template == "mutation"
            else expression.crossovers(known[0], known[1], rng)
        )
        return grammar.choice(self._forecast.promising(made, assignment.judged, _EXPRESSIONS_OFFERED), rng)


def _agent(model_calls: int, toolbox: Sequence[BaseTool], page: str) -> Any:
    """An agent with these tools that is told `page` first; its chat model is the context that it is invoked with."""
    limit = ModelCallLimitMiddleware[Any, Any](run_limit=model_calls, exit_behavior="end")
    return create_agent(
        FakeListChatModel(responses=[]),  # which is never asked
        tools=list(toolbox),
        system_prompt=page,
        middleware=[limit, Asking(), Failures(NEXT_STEP)],
        response_format=ToolStrategy(Proposal),
    )


@cache
def _small_agent(model_calls: int) -> Any:
    """The same for all proposals, and made once: that takes as long as all else that it does."""
    return _agent(model_calls, [], render("small_system"))


def _ask_small(assignment: Assignment, names: Sequence[str]) -> str:
    parents = [
        {"fitness": parent.fitness, "expression": its}
        for parent, its in zip(assignment.parents, _expressions(assignment), strict=True)
    ]
    return render(f"small_{_written(assignment)}", parents=parents, features=names)


def _expressions(assignment: Assignment) -> list[str | None]:
    return [grammar.expression_of(parent.proxy.code) for parent in assignment.parents]


def _written(assignment: Assignment) -> str:
    """The template as a small model can follow it: parents that are no expressions cannot be edited."""
    return "initialization" if None in _expressions(assignment) else assignment.template


def _tokens(messages: Sequence[BaseMessage]) -> int:
    answers = [message for message in messages if isinstance(message, AIMessage)]
    return sum(message.usage_metadata["total_tokens"] for message in answers if message.usage_metadata)


def _tool_calls(messages: Sequence[BaseMessage]) -> tuple[str, ...]:
    return tuple(
        str(message.name) for message in messages if isinstance(message, ToolMessage) and message.name != SUBMIT
    )
