"""`tap-agent report`: what became of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def make_report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]) -> None:
    """Write the report of a finished run again, and print its table."""
    from tap_agent.report import html
    from tap_agent.runs.files import write
    from tap_agent.runs.folder import find
    from tap_agent.terminal.console import show_result

    folder = find(run)
    result = folder.finished()
    write(folder.report, html.render(result))
    show_result(folder, result)
