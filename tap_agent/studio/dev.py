"""The process of the LangGraph server: what `langgraph dev` does for langgraph.json, without what Studio does not need.

`langgraph dev` itself would begin again by itself what a crash or Ctrl-C cut off, and that may
cost money: it keeps runs of graphs in a file and cannot be told not to. Here the run folders
alone are kept. It would also report its use to its makers, and print a banner before it
answers, and the stack of each mistake, which is told where it was made.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[2] / "langgraph.json"
_SILENT = ("cli", "graph", "timing.timer")  # the banner, and that torch and a search take time to open
_PAUSE = 1.0  # seconds between two looks for the parent
_JOBS = 8  # graphs at once: a conversation does not wait for a search


def main(host: str, port: int, *, browser: bool) -> None:
    """Serves until it is interrupted."""
    from langgraph_api.cli import run_server
    from langgraph_cli.config import validate_config_file

    for name in _SILENT:
        logging.getLogger(f"langgraph_api.{name}").setLevel(logging.CRITICAL)
    logging.getLogger("langgraph_api.worker").addFilter(lambda record: "graphs.Refusal" not in str(record.msg))
    threading.Thread(target=_leave_with, args=[os.getppid()], daemon=True).start()
    config = validate_config_file(CONFIG)
    run_server(
        host,
        port,
        graphs=config["graphs"],
        checkpointer=config["checkpointer"],
        http=config["http"],
        n_jobs_per_worker=_JOBS,
        open_browser=browser,
        disable_persistence=True,
        server_level="ERROR",
    )


def _leave_with(parent: int) -> None:
    """Ends this process once its parent has gone, killed or not."""
    while os.getppid() == parent:
        time.sleep(_PAUSE)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), browser=sys.argv[3:] == ["browser"])
