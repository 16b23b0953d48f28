"""A run's answers in a file, and a run that takes them from there: a whole search without any model.

One line an answer, of the call that a proposal's agent makes first, second and so on. What is
submitted stands as thought and code; every field but `name`, `call` and what the model said
may be left out:

    {"name": "p003", "call": 1, "tool_calls": [{"name": "run_code", "args": {"code": "..."}}], "tokens": [900, 120]}
    {"name": "p003", "call": 2, "llm": "openai:gpt-x", "thought": "...", "code": "..."}
    {"name": "notebook 0", "call": 1, "llm": "openai:gpt-x", "content": "..."}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from pydantic import ValidationError

from agents.account import Conversation
from agents.answer import SUBMIT, Answer
from agents.chat import ModelMistake

Place = tuple[str, int]
"""candidate, or the notebook after a generation, and ordinal of the call"""


class Line(Answer):
    """One line of a replay file."""

    name: str
    call: int
    llm: str = "replay"
    thought: str | None = None
    code: str | None = None

    def answer(self) -> Answer:
        """What the model said."""
        said = self.model_dump(include=set(Answer.model_fields))
        if self.code is not None:
            proposal = {"name": SUBMIT, "args": {"thought": self.thought or "", "code": self.code}}
            said["tool_calls"] = [*said["tool_calls"], proposal]
        return Answer.model_validate(said)


def written(answers: Iterable[tuple[str, int, str, Answer]]) -> str:
    """The text of a replay file with these: candidate, ordinal, language model and answer."""
    lines = []
    for name, ordinal, llm, answer in answers:
        said = answer.model_dump(mode="json", exclude_defaults=True)
        calls = answer.tool_calls
        if len(calls) == 1 and calls[0].name == SUBMIT and calls[0].args.keys() == {"thought", "code"}:
            del said["tool_calls"]
            said = calls[0].args | said
        lines.append(json.dumps({"name": name, "call": ordinal, "llm": llm} | said))
    return "".join(line + "\n" for line in lines)


@dataclass(frozen=True)
class Replay:
    """The answers in the replay file at `path`, in the place of language models."""

    path: Path

    @property
    def members(self) -> tuple[()]:
        """No model: nothing is asked, and nothing is paid."""
        return ()

    @cached_property
    def _lines(self) -> Mapping[Place, Line]:
        try:
            lines = self.path.read_text().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelMistake(
                f"the replay file {self.path} cannot be read ({error}): give an existing one."
            ) from error
        found: dict[Place, Line] = {}
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                line = Line.model_validate(json.loads(text))
            except (ValueError, ValidationError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ModelMistake(f"line {number} of the replay file {self.path} is no answer: {reason}") from error
            found[line.name, line.call] = line
        return found

    def check(self) -> None:
        """Raises `ModelMistake` unless the file can be read."""
        self._lines  # noqa: B018

    def draw(self, name: str, seed: int) -> Replayed:
        """What answers for the candidate `name`."""
        first = self._lines.get((name, 1))
        return Replayed(first.llm if first else "replay", self.path, self._lines, first is not None)


@dataclass(frozen=True)
class Replayed:
    """The model called `spec`, as a replay file has it."""

    spec: str
    path: Path
    lines: Mapping[Place, Line]
    reflects: bool
    """whether the file has an answer: one that was recorded without a notebook is repeated without"""

    @property
    def small(self) -> bool:
        """Never: a small model's answers are recorded as tool calls."""
        return False

    def chat(self, conversation: Conversation, seed: int, grammar: str | None) -> BaseChatModel:
        """A chat model that reads its answers from the file."""
        return ReplayChat(conversation=conversation, path=self.path, lines=self.lines)


class ReplayChat(BaseChatModel):
    """A chat model that says what `lines` hold, whatever it is asked."""

    conversation: Conversation
    path: Path
    lines: Mapping[Place, Any]

    @property
    def _llm_type(self) -> str:
        return "replay"

    def bind_tools(self, tools: Any, **options: Any) -> Runnable[Any, Any]:
        """Itself: the calls of tools are in the file."""
        return self

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> ChatResult:
        call = self.conversation.call("replay")
        line = self.lines.get((call.name, call.ordinal))
        if line is None:
            raise ModelMistake(
                f"{self.path} has no answer for call {call.ordinal} of {call.name}: give the settings of the run that "
                "it was written by, or add the line."
            )
        answer = line.answer()
        self.conversation.account.keep(call, answer)
        return ChatResult(generations=[ChatGeneration(message=answer.message())])
