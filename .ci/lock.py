"""Writes into constraints.txt the releases that pip lists in a file.

What is not installed here stays as it was, as CUDA's libraries where torch is without them.
"""

from __future__ import annotations

import sys
from pathlib import Path


def locked(frozen: str, before: str) -> str:
    """The text of constraints: its comments, then a line for each package, by name."""
    comments = [line for line in before.splitlines() if line.startswith("#")]
    pins: dict[str, str] = {}
    for line in [*before.splitlines(), *frozen.splitlines()]:
        name, equal, version = line.partition("==")
        if equal and not line.startswith("#"):
            pins[name.lower().replace("_", "-")] = f"{name}=={version.removesuffix('+cpu')}"
    return "\n".join([*comments, *(pins[name] for name in sorted(pins))]) + "\n"


if __name__ == "__main__":
    _, frozen, constraints = sys.argv
    path = Path(constraints)
    path.write_text(locked(Path(frozen).read_text(), path.read_text()))
