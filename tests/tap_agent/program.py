"""The program, run as a person runs it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tap_agent.__main__ import main

GOOD = "def sensitivity(layers, task):\n    return [1 / layer['params'] for layer in layers]\n"
REPLAYED = Path(__file__).parents[1] / "replays" / "digits.jsonl"
REPLAY = f"replay:{REPLAYED}"
"""a language model that has said it all before, so that nothing waits for one"""
SMALL = ["--population", "3", "--generations", "1", "--search", "200", "--test", "200", "--draws", "2"]


def tap(*arguments: str) -> int:
    """Runs the program in this process; its exit status."""
    before, sys.argv = sys.argv, ["tap-agent", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def hear() -> None:
    """Has a process that is about to begin take signals as from a terminal: a shell's background job, and what nohup
    starts, is deaf to some."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
