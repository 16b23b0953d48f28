"""An answer of a language model as plain JSON, which is what logs, caches and replay files hold.

Every answer passes through this record on its way to an agent, fresh ones too, so that a
conversation goes on in the same way wherever its answers come from.
"""

from __future__ import annotations

import json
from typing import Any, Self

from langchain_core.messages import AIMessage
from langchain_core.messages.ai import UsageMetadata
from pydantic import BaseModel, ConfigDict, model_validator

SUBMIT = "Proposal"
"""Name of the tool with which an agent submits its proposal."""
_MOST_TOKENS = 2**31
REASONING = "reasoning_content"
"""Under this name some servers give a model's reasoning, and want it back with the next request."""


class ToolCall(BaseModel):
    """A tool that the model calls."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    args: dict[str, Any]
    id: str = ""


def _counted(usage: UsageMetadata | None) -> tuple[int, int] | None:
    """Tokens in and out, where a server's count can be one: every request has some."""
    if usage is None or not (0 < usage["input_tokens"] < _MOST_TOKENS and 0 <= usage["output_tokens"] < _MOST_TOKENS):
        return None
    return usage["input_tokens"], usage["output_tokens"]


class Answer(BaseModel):
    """What a model said and called."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    tokens: tuple[int, int] | None = None
    """in and out, as the server counted them"""

    @model_validator(mode="before")
    @classmethod
    def _writable(cls, value: Any) -> Any:
        """Half a surrogate pair, which JSON can spell, could be written to no file."""
        return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))

    @classmethod
    def of(cls, message: AIMessage) -> Self:
        """The record of `message`; a call whose arguments are no JSON becomes something said."""
        said = [str(message.text), *(str(call["args"]) for call in message.invalid_tool_calls)]
        return cls.model_validate(
            {
                "content": "\n".join(filter(None, said)),
                "tool_calls": [
                    {"name": call["name"], "args": call["args"], "id": call["id"] or f"call-{place}"}
                    for place, call in enumerate(message.tool_calls)
                ],
                "reasoning": message.additional_kwargs.get(REASONING) or "",
                "tokens": _counted(message.usage_metadata),
            }
        )

    def message(self) -> AIMessage:
        """The message that this records."""
        message = AIMessage(
            self.content,
            tool_calls=[
                {"name": call.name, "args": call.args, "id": call.id or f"call-{place}"}
                for place, call in enumerate(self.tool_calls)
            ],
            additional_kwargs={REASONING: self.reasoning} if self.reasoning else {},
        )
        if self.tokens:
            spent, written = self.tokens
            message.usage_metadata = {
                "input_tokens": spent,
                "output_tokens": written,
                "total_tokens": spent + written,
            }
        return message
