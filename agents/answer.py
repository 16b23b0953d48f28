"""An answer of a language model as plain JSON, which is what logs, caches and replay files hold.

Every answer passes through this record on its way to an agent, fresh ones too, so that a
conversation goes on in the same way wherever its answers come from. It is bounded here, so
that whatever is made of it is: prompts, events, checkpoints, the report.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from langchain_core.messages import AIMessage
from pydantic import BaseModel, ConfigDict, model_validator

SUBMIT = "Proposal"
"""Name of the tool with which an agent submits its proposal."""
REASONING = "reasoning_content"
"""Under this name some servers give a model's reasoning, and want it back with the next request."""
Ending = Literal["", "cut", "filtered", "refused"]
"""Why there is no more of an answer: cut at its most tokens, filtered by the server, or refused by the model; or as it
should be."""
LONGEST_TEXT = 2**16
"""characters of what is said, of the reasoning, and of the arguments of one call"""
LONGEST_THOUGHT = 4000
LONGEST_CODE = 20_001
"""one more than any sandbox takes: what is longer is refused there, and cut code is never taken for whole"""
MOST_CALLS = 16
_LONGEST_NAME = 100  # characters of a tool's name, and of a call's
_DEEPEST = 8  # levels of arguments


class ToolCall(BaseModel):
    """A tool that the model calls."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    args: dict[str, Any]
    id: str = ""

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("args"), dict):
            return value
        args = _cut(value["args"])
        fits = len(json.dumps(args, ensure_ascii=False)) <= LONGEST_TEXT
        names = {name: _short(value[name], _LONGEST_NAME) for name in ("name", "id") if name in value}
        return {**value, **names, "args": args if fits else {}}


class Answer(BaseModel):
    """What a model said and called."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    tokens: tuple[int, int] | None = None
    """in and out, as the server counted them"""
    ending: Ending = ""

    @model_validator(mode="before")
    @classmethod
    def _writable(cls, value: Any) -> Any:
        """Bounded, and without half surrogate pairs, which JSON can spell and no file can hold."""
        value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
        if isinstance(value, dict):
            value |= {name: _short(value[name], LONGEST_TEXT) for name in ("content", "reasoning") if name in value}
            if isinstance(value.get("tool_calls"), list):
                value["tool_calls"] = value["tool_calls"][:MOST_CALLS]
        return value

    def message(self) -> AIMessage:
        """The message that this records."""
        message = AIMessage(
            self.content,
            tool_calls=[
                {"name": call.name, "args": call.args, "id": call.id or f"call-{place}"}
                for place, call in enumerate(self.tool_calls)
            ],
            additional_kwargs={REASONING: self.reasoning} if self.reasoning else {},
            response_metadata={"ending": self.ending} if self.ending else {},
        )
        if self.tokens:
            spent, written = self.tokens
            message.usage_metadata = {
                "input_tokens": spent,
                "output_tokens": written,
                "total_tokens": spent + written,
            }
        return message


def _cut(value: Any, name: str = "", depth: int = 0) -> Any:
    """An argument of the tool's parameter `name`, with its texts bounded."""
    match value:
        case str() if name == "code":
            return value[:LONGEST_CODE]
        case str():
            return _short(value, LONGEST_THOUGHT if name == "thought" else LONGEST_TEXT)
        case dict() | list() if depth > _DEEPEST:
            return None
        case dict():
            return {key: _cut(each, key, depth + 1) for key, each in value.items()}
        case list():
            return [_cut(each, name, depth + 1) for each in value]
        case _:
            return value


def _short(text: Any, most: int) -> Any:
    return text[: most - 1] + "…" if isinstance(text, str) and len(text) > most else text
