"""The notebook of a search: what a language model learns, generation after generation, from what came of them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, convert_to_openai_messages

from agents.account import Conversation
from agents.assignment import Outcome
from agents.proposer import NEXT_STEP, Proposer, naming_failures
from prompts import render

MOST_LINES = 10
_LONGEST_LINE = 240
_MARK = re.compile(r"^(?:[-*•#>]|\d+[.)])\s*")


@dataclass(frozen=True)
class Reflection:
    """What the notebook says after a generation, and how it came about."""

    lines: tuple[str, ...]
    llm: str
    tokens: int
    conversation: tuple[dict[str, Any], ...]
    """every message but the system's, as OpenAI writes them"""
    seconds: float


def name_of(generation: int) -> str:
    """Under which the call after a generation stands in the account."""
    return f"notebook {generation}"


def reflect(
    proposer: Proposer, name: str, seed: int, notebook: Sequence[str], outcomes: Sequence[Outcome]
) -> Reflection | None:
    """The `notebook` after a generation with these `outcomes`, from one call under `name`; an empty answer leaves it.

    None where the model that is drawn has nothing to say of a generation, which goes for small ones. A call that fails
    raises `ModelMistake`.
    """
    started = time.perf_counter()
    model = proposer.models.draw(name, seed)
    if not model.reflects:
        return None
    question = HumanMessage(render("reflection", notebook=notebook, outcomes=outcomes, most=MOST_LINES))
    chat = model.chat(Conversation(proposer.account, name, model.spec), seed, None)
    with naming_failures(NEXT_STEP):
        answer = chat.invoke([SystemMessage(proposer.briefing), question])
    assert isinstance(answer, AIMessage)
    return Reflection(
        tuple(lines(answer.text)) or tuple(notebook),
        model.spec,
        answer.usage_metadata["total_tokens"] if answer.usage_metadata else 0,
        tuple(convert_to_openai_messages([question, answer], text_format="string")),
        time.perf_counter() - started,
    )


def lines(text: str) -> list[str]:
    """Those of an answer without bullets, at most `MOST_LINES`, each cut to what a prompt can take."""
    found = [_MARK.sub("", " ".join(line.split())) for line in text.splitlines()]
    return [line[:_LONGEST_LINE] for line in found if line and not line.startswith("```")][:MOST_LINES]
