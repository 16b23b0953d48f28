"""A scripted agent of conversations: what it is asked, what it does, and what is heard of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tap_agent.sessions.conversation import Part
from tests.agents.scripted import Answer, tool_call

BY_STD = 'def sensitivity(layers, task):\n    return [layer["weight_std"] ** 2 for layer in layers]\n'
BY_SIZE = 'def sensitivity(layers, task):\n    return [1.0 / layer["params"] for layer in layers]\n'
LAYERS = "blocks.1.0.0"


def words(parts: Iterator[Part]) -> str:
    return "".join(part.text for part in parts if part.kind == "words")


def said(request: dict[str, Any]) -> str:
    """The person's last message."""
    return str([message for message in request["messages"] if message["role"] == "user"][-1]["content"])


def results(request: dict[str, Any]) -> list[str]:
    """What tools gave since the person's last message."""
    found: list[str] = []
    for message in request["messages"]:
        found = [] if message["role"] == "user" else found
        if message["role"] == "tool":
            found.append(str(message["content"]))
    return found


def text(content: str) -> Answer:
    return {"role": "assistant", "content": content}


def agent(request: dict[str, Any]) -> Answer:
    """Does in tools what the person asks for, and tells what came of it."""
    calls: dict[str, list[Answer]] = {
        "why": [tool_call("show_features", layer=LAYERS)],
        "change": [tool_call("run_code", code=BY_STD), tool_call("propose", thought="By spread.", code=BY_STD)],
        "break": [tool_call("propose", thought="Broken.", code="def sensitivity(layers, task):\n    return 1 / 0\n")],
        "measure": [tool_call("measure")],
        "keep": [tool_call("accept")],
        "elsewhere": [tool_call("try_network", network="digits", images=None, weights=None)],
        "nowhere": [tool_call("try_network", network="no_such_net", images="digits", weights=None)],
        "import": [tool_call("try_network", network="shutil:get_terminal_size", images=None, weights=None)],
        "compare": [tool_call("compare", name="p000")],
    }
    done = results(request)
    todo = calls[said(request).split()[0]][len(done) :]
    return todo[0] if todo else text(f"So: {done[-1]}")
