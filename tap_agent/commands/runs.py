"""`tap-agent report` and `tap-agent list`: what became of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tap_agent.paths import RUNS


def make_report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]) -> None:
    """Write the report of a finished run again, and print its table."""
    from tap_agent.report import html
    from tap_agent.runs.folder import find, write
    from tap_agent.terminal.console import show_result

    folder = find(run)
    result = folder.finished()
    write(folder.report, html.render(result))
    show_result(folder, result)


def list_runs(folder: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="Where the runs are.")] = RUNS) -> None:
    """List the runs, the newest first."""
    from tap_agent.runs.folder import runs
    from tap_agent.terminal.console import out, runs_table

    found = runs(folder)
    if not found:
        out.print(f"no runs in {folder}: start one with `tap-agent run`.")
        return
    out.print(runs_table(found))
