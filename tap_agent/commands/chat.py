"""`tap-agent chat`: a conversation about a proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tap_agent.commands.options import takes_settings
from tap_agent.paths import RUNS


@takes_settings
def chat(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Folder of a finished run; by default the latest.")
    ] = None,
    proxy: Annotated[str | None, typer.Option(help="Name of a proxy of it; by default the best.")] = None,
    **flags: Any,
) -> None:
    """Refine a proxy by talking about it; what is accepted becomes a child in the run's family tree.

    Measuring and accepting ask first. The conversation is kept in the run and goes on where it was; its calls are
    in the run's account, but its limits do not stop a person.
    """
    from tap_agent.paths import cache_folder
    from tap_agent.report.text import spent_text
    from tap_agent.runs.folder import RunMistake, find, runs
    from tap_agent.sessions.conversation import Conversation, unlimited
    from tap_agent.sessions.resources import Resources
    from tap_agent.terminal.chat import converse
    from tap_agent.terminal.console import out

    folder = next((each for each in runs(RUNS) if each.result()), None) if run is None else find(run)
    if folder is None:
        raise RunMistake(f"no run in {RUNS} has ended: start one with `tap-agent run`.")
    result = folder.finished()
    out.print(str(folder.path), markup=False, style="dim")
    settings = folder.settings(flags)
    with Resources(unlimited(settings), cache_folder()) as resources:
        with out.status("opening network, images and sandbox"):
            resources.open()
        with Conversation(folder, proxy or result.best, resources) as conversation:
            converse(conversation)
            out.print(f"[dim]the run, with its conversations: {spent_text(conversation.spent)}[/dim]")
