"""`tap-agent studio`: the runs in LangGraph Studio."""

from __future__ import annotations

from typing import Annotated

import typer

from tap_agent.paths import RUNS


def studio(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the server listens; 0 is a free port.")] = 2024,
    host: Annotated[
        str, typer.Option(help="The address that it listens on; whoever reaches it can have code run here.")
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open Studio in the browser.")] = True,
) -> None:
    """Show the runs in LangGraph Studio: their history, forks from any step, and new searches.

    A run is a thread there; one that is started there is a run here. Ctrl-C ends the server.
    """
    from tap_agent.studio.server import serve

    serve(RUNS, host, port, browser=browser, tell=typer.echo)
