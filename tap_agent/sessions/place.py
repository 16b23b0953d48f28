"""Where a table is measured, network after network, and who is told of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tap_agent.sessions.apply import Watch
from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import NetworkSettings, Settings
from tap_agent.tables.line import Line
from tap_agent.tables.plan import Planned, Variant
from tap_eval.mistake import ImagesMistake, NetworkMistake, WeightsMistake

_NOT_OPENED = (NetworkMistake, WeightsMistake, ImagesMistake)
"""why a network has no figures, which those of others do not wait for"""
Lines = Iterator[list[Line]]
"""those of a table so far, again whenever there are more"""


class Listener(Watch, Protocol):
    """Is told what goes on, and what a user should know."""

    def watch(self, what: str, done: int, of: int) -> None:
        """Of something beside it, so much is done."""
        ...

    def tell(self, note: str) -> None:
        """Something to know of a network or its images."""
        ...


@dataclass
class Place:
    """Where measurements and searches are kept, and who listens."""

    cache: Path
    folder: Path
    """of searches"""
    listener: Listener
    stopping: threading.Event
    """set once no call of a language model is to begin"""
    measured: int = 0
    """values that had to be computed; the rest was recalled"""
    _told: set[str] = field(default_factory=set)

    @contextmanager
    def opened(self, settings: Settings) -> Iterator[Resources]:
        """Resources that tell who listens."""
        self.listener.begin(f"opening {', '.join(network.network for network in settings.networks)} and its images")
        with Resources(settings, self.cache) as resources:
            resources.watch, resources.stopping = self.listener.watch, self.stopping
            try:
                for note in (note for bench in resources.benches for note in bench.notes):
                    self.tell(note)
                yield resources
            finally:
                self.measured += resources.ledger.measured

    def tell(self, note: str) -> None:
        """Passes a note on, once."""
        if note not in self._told:
            self._told.add(note)
            self.listener.tell(note)


def each_network(planned: Planned, lines_of: Callable[[Variant, NetworkSettings, Settings], Lines]) -> Lines:
    """What `lines_of` gives for each variant and network, one after the other.

    It is given the settings with that network alone.
    """
    before: list[Line] = []
    asked = planned.given and len(planned.variants[0].settings.networks) == 1
    for variant in planned.variants:
        for network in variant.settings.networks:
            found: list[Line] = []
            try:
                check_there(network)
                for found in lines_of(variant, network, variant.settings.model_copy(update={"networks": (network,)})):
                    yield [*before, *found]
            except _NOT_OPENED as mistake:
                if asked:
                    raise
                note = f"not measured: {mistake}"
                line = Line(network=network.network, row="ours", kind="proxy", variant=variant.label, note=note)
                found = [*found, line]
                yield [*before, *found]
            before += found


def check_there(network: NetworkSettings) -> None:
    """Raises a `Mistake` that says where a file goes which is not there."""
    for flag, source in (("images", network.images), ("calibration", network.calibration)):
        kind, _, where = (source or "").partition(":")
        if where and not Path(where).exists():
            raise ImagesMistake(
                f"{network.network} needs images at {where}, and nothing is there: put them there, or give --{flag} "
                f"{kind}:PATH."
            )
    if network.weights and not network.weights.exists():
        raise WeightsMistake(
            f"{network.network} needs weights at {network.weights}, and nothing is there: put a state dict there, or "
            "give --weights FILE."
        )
