"""`tap-agent inspect`: what is in a file."""

from __future__ import annotations

from typing import Annotated

import typer


def look(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A run's folder; a .safetensors, .onnx or .pt2 file that TAP wrote; an allocation file, which is a "
            "run's best.json or what `apply --out` wrote.",
        ),
    ],
) -> None:
    """Show what is in a run, a file of a network or an allocation file.

    Its layers with their bits, how and in how many bytes they are stored, the scales of their weights and the range of
    their inputs; what stays in float; and what the file says of itself.
    """
    from tap_agent.sessions.inspection import inspect
    from tap_agent.terminal.console import out
    from tap_agent.terminal.inspection import shown

    for inspected in inspect(what):
        out.print(shown(inspected), soft_wrap=False)
