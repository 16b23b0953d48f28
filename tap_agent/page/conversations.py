"""The conversations that are open on the page: as many as are in use, and a few more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from agents.embedded import EMBEDDED
from tap_agent.page.chat import Chat
from tap_agent.runs.folder import RunFolder, RunMistake
from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import Settings

_CHATS_OPEN = 2


class Conversations(AbstractContextManager["Conversations"]):
    """Opens and closes conversations; safe to use from several threads."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._chats: dict[tuple[str, str], Chat] = {}
        self._left: list[Chat] = []  # with another model than now, and perhaps still in use
        self._lock = threading.RLock()

    def __exit__(self, *_: object) -> None:
        for chat in (*self._chats.values(), *self._left):
            chat.__exit__()

    @contextmanager
    def opened(self, run: RunFolder, proxy: str) -> Iterator[Chat]:
        """The conversation about a proxy of a run that has ended, to be used meanwhile; raises a `Mistake`."""
        with self._lock:
            if (run.name, proxy) not in self._chats:
                self._open(run, proxy, run.settings())
            chat = self._chats[run.name, proxy]
            chat.users += 1
        try:
            yield chat
        finally:
            with self._lock:
                chat.users -= 1
                self._close()

    def change_model(self, run: RunFolder, proxy: str, llm: str, base_url: str) -> None:
        """Goes on with another language model; raises a `Mistake` when it cannot be asked."""
        flags = {"llm": llm.strip() or None, "base_url": base_url.strip() or None}
        if flags["base_url"] == run.settings().base_url:
            flags["base_url"] = None  # the form has it already, whichever model is then named
        settings = run.settings(flags)
        if settings.llm != EMBEDDED:
            Resources(settings, self._cache).models.check()
        with self._lock:
            if (chat := self._chats.get((run.name, proxy))) and chat.busy:
                raise RunMistake("an answer is still coming: wait for it, or stop it.")
            self._open(run, proxy, settings)

    def _open(self, run: RunFolder, proxy: str, settings: Settings) -> None:
        """Opens a conversation, in place of the one about the same proxy."""
        opened = Chat(run, proxy, settings, self._cache)
        if before := self._chats.pop((run.name, proxy), None):
            self._left.append(before)
        self._chats[run.name, proxy] = opened

    def _close(self) -> None:
        """Closes what nobody uses: those with another model, and of the others the oldest beyond `_CHATS_OPEN`."""
        idle = [key for key, chat in self._chats.items() if not (chat.users or chat.busy)]
        for key in idle[: max(0, len(self._chats) - _CHATS_OPEN)]:
            self._left.append(self._chats.pop(key))
        for chat in [chat for chat in self._left if not (chat.users or chat.busy)]:
            self._left.remove(chat)
            chat.__exit__()
