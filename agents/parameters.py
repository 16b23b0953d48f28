"""What a request may do without: parameters that some servers refuse, and how it is told which."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping
from typing import Any, Literal

Parameter = Literal["seed", "temperature", "max_tokens", "tool_choice"]
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""names that servers have for the most tokens of an answer"""
_KINDS: tuple[tuple[str, ...], ...] = (("seed",), ("temperature",), _LIMITS, ("tool_choice",), ("stream_options",))


def without(request: Mapping[str, Any], left_out: Collection[Parameter]) -> dict[str, Any]:
    """`request` without these."""
    names = {name for kind in _KINDS if kind[0] in left_out for name in kind}
    return {name: value for name, value in request.items() if name not in names}


def named(request: Mapping[str, Any], words: str) -> tuple[str, str | None] | None:
    """The parameter of `request` that a server's `words` name first, and the one that they ask for in its place."""
    found = []
    for kind in _KINDS:
        sent = next((name for name in kind if name in request), None)
        place = re.search(rf"\b(?:{'|'.join(kind)})\b", words)
        if sent and place:
            instead = next((name for name in kind if name != sent and re.search(rf"\b{name}\b", words)), None)
            found.append((place.start(), sent, instead))
    return min(found)[1:] if found else None


class Refused:
    """What the server of one model has refused so far, for its calls in any thread."""

    def __init__(self) -> None:
        self._instead: dict[str, str | None] = {}
        self._learning = threading.Lock()

    def known(self) -> dict[str, str | None]:
        """Each parameter that was refused, with what is sent in its place."""
        with self._learning:
            return dict(self._instead)

    def learn(self, name: str, instead: str | None) -> bool:
        """Notes a refusal; says whether it is news."""
        with self._learning:
            news = name not in self._instead
            self._instead[name] = None if instead in self._instead else instead
            return news


def accepted(request: Mapping[str, Any], refused: Mapping[str, str | None]) -> dict[str, Any]:
    """`request` as a server takes it that has `refused` these."""
    sent = dict(request)
    for name, instead in refused.items():
        if name in sent:
            value = sent.pop(name)
            if instead:
                sent[instead] = value
    return sent
