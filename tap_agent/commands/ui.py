"""`tap-agent ui`: the runs in the browser."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from tap_agent.paths import RUNS


def ui(
    folder: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="Where the runs are.")] = RUNS,
    host: Annotated[str, typer.Option(help="Address; any but the loopback needs a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Show the runs in the browser: start, watch, stop and resume them, and talk about their proxies.

    The password, where others than this machine reach the page, comes from the environment variable TAP_UI_PASSWORD.
    """
    from tap_agent.page.app import PASSWORD, serve
    from tap_agent.paths import cache_folder

    password = os.environ.pop(PASSWORD, None) or None  # no run that the page starts inherits it
    with suppress(KeyboardInterrupt):
        serve(folder, cache_folder(), host, port, password, browser=browser, tell=typer.echo)
