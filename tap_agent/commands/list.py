"""`tap-agent list`: the runs, a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tap_agent.paths import RUNS


def list_runs(folder: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="Where the runs are.")] = RUNS) -> None:
    """List the runs, the newest first."""
    from tap_agent.runs.folder import runs
    from tap_agent.terminal.console import out, runs_table

    found = runs(folder)
    if not found:
        out.print(f"no runs in {folder}: start one with `tap-agent run`.", markup=False)
        return
    out.print(runs_table(found))
