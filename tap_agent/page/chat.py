"""A conversation for the page: every turn runs in a thread, so that it goes on when the page is closed."""

from __future__ import annotations

import itertools
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from agents.refiner import Stopped, Version
from graphs.state import Bits
from tap_agent.report.layer_figures import Drawn
from tap_agent.runs.folder import RunFolder, RunMistake
from tap_agent.runs.result import History
from tap_agent.sessions.conversation import Conversation, Part, unlimited
from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import Settings
from tap_eval.mistake import Mistake
from tap_eval.proxies.proxy import Rejection
from tools.evaluation import Scored


class Chat(AbstractContextManager["Chat"]):
    """A conversation about one proxy, and what has been said of the answer that is coming."""

    def __init__(self, folder: RunFolder, proxy: str, settings: Settings, cache: Path) -> None:
        """`settings` are those of the run, or with another language model; raises a `Mistake`."""
        self.settings = settings
        self.trouble = ""
        """why the last answer broke off, in a sentence"""
        self.users = 0
        """requests that are at it, kept by `Conversations`"""
        self._resources = Resources(unlimited(settings), cache)
        self.conversation = Conversation(folder, proxy, self._resources)
        self._said: list[Part] = []
        self._scored: dict[str, Scored | Rejection] = {}
        self._starting = threading.Lock()
        self._turn: threading.Thread | None = None

    def __exit__(self, *_: object) -> None:
        self.conversation.__exit__()
        self._resources.__exit__()

    @property
    def busy(self) -> bool:
        """Whether an answer is coming."""
        return self._turn is not None and self._turn.is_alive()

    @property
    def stamp(self) -> tuple[object, ...]:
        """Differs from what it was when there is something new to see."""
        model = (self.settings.llm, self.settings.base_url)
        return (*model, self.conversation.step, len(self._said), self.busy, self.trouble, len(self._scored))

    def said(self) -> list[Part]:
        """The last answer, as far as it has come; words that follow each other in one part."""
        groups = itertools.groupby(list(self._said), lambda part: part.kind)
        return [
            part
            for kind, parts in groups
            for part in ([Part("words", "".join(each.text for each in parts))] if kind == "words" else parts)
        ]

    def turn(self, answer: Callable[[Conversation], Iterator[Part]], goes_on: bool = False) -> None:
        """Lets `answer` come, which may go on where the last one stopped; raises `RunMistake` while one is coming."""
        with self._starting:
            if self.busy:
                raise RunMistake("an answer is still coming: wait for it, or stop it.")
            self.trouble = ""
            self._said = self._said if goes_on else []
            self._turn = threading.Thread(target=self._take, args=[answer], daemon=True)
            self._turn.start()

    def _take(self, answer: Callable[[Conversation], Iterator[Part]]) -> None:
        try:
            for part in answer(self.conversation):
                self._said.append(part)
            version = self.conversation.version
            if not version.name and version.code not in self._scored:
                self._scored[version.code] = self.conversation.score(version)
        except Stopped:
            self.trouble = "Stopped; it can go on."
        except Mistake as mistake:
            self.trouble = str(mistake)
        except Exception as error:  # noqa: BLE001 a thread has nobody to raise it to
            traceback.print_exc(file=sys.stderr)
            self.trouble = f"It failed ({type(error).__name__}: {error}); the terminal of `tap-agent ui` says where."

    def drawn(self, history: History, index: int) -> list[Drawn]:
        """What the version before, if there is one, and the version as it stands make of the network at `index`.

        Empty while the version as it stands has not been scored, which this begins if nothing else is going on.
        """
        version = self.conversation.version
        found = [self._drawn(each, history, index) for each in (self.conversation.before, version) if each]
        if found[-1] is None and version.code not in self._scored and not (self.busy or self.trouble):
            self.turn(lambda _: iter(()), goes_on=True)
        return [each for each in found if each] if found[-1] else []

    def _drawn(self, version: Version, history: History, index: int) -> Drawn | None:
        if version.name:
            return Drawn.of(history.candidate(version.name), index)
        scored = self._scored.get(version.code)
        if not isinstance(scored, Scored):
            return None
        return Drawn("now", Bits.of(scored.allocations[index]).means(), scored.scores[index])
