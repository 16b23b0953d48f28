"""Ctrl-C during a search: no call of a language model begins after it, and a second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from tap_agent.exit import Exit
from tap_agent.terminal.console import out


@contextmanager
def interruptible(stopping: threading.Event) -> Iterator[None]:
    """Sets `stopping` at the first interrupt, which raises `KeyboardInterrupt` here; what is under way ends by itself.

    The second one ends the process without waiting for that: each step is written before the
    next begins, and a call that was sent counts at what was reserved for it.
    """

    def hear(*_: object) -> NoReturn:
        if stopping.is_set():
            out.show_cursor()
            os._exit(Exit.INTERRUPTED)
        stopping.set()
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # as for a script's job in the background, which a Ctrl-C does not mean
        signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
