"""The entry: makes sure that the packages it will import are its own, then hands over to the command line.

`agents` and `tools` are common names; openai-agents, for one, installs an `agents`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path

PACKAGES = ("graphs", "agents", "tools", "prompts", "tap_eval")


def intruder() -> str | None:
    """A sentence about the first of our packages that another installation shadows."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [Path(place).resolve().parent for place in (spec.submodule_search_locations or ())] if spec else []
        if home not in places[:1]:
            where = f"comes from {places[0]}" if places else "is not installed"
            return (
                f"the package '{name}' {where}, where TAP's own is expected in {home}: "
                "install tap-agent in an environment of its own."
            )
    return None


def hear_interrupts() -> None:
    """Lets a process with a session of its own be interrupted.

    A background job of a shell ignores SIGINT, and so does what it starts: the runs of a page, say,
    which no terminal can interrupt, but the page does.
    """
    if os.getsid(0) == os.getpid() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def open_streams() -> None:
    """Has somewhere to write to where standard streams were closed, as daemons do."""
    while (taken := os.open(os.devnull, os.O_RDWR)) < 3:  # else the next file that is opened would be one of them
        pass
    os.close(taken)
    sys.stdin = sys.stdin or os.fdopen(0)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def main() -> None:
    """Runs the program; exit status 1 if its packages are not its own."""
    open_streams()
    if sentence := intruder():
        sys.exit(f"error: {sentence}")
    hear_interrupts()
    from tap_agent.commands.app import run_app

    run_app()


if __name__ == "__main__":
    main()
