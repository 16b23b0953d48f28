"""The LangGraph server over langgraph.json, for Studio: a process of its own, in which the runs are threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import httpx

from tap_agent.runs.checkpoints import conversations, tip_of
from tap_agent.runs.folder import runs
from tap_agent.serving.address import listen
from tap_agent.studio.dev import CONFIG
from tap_agent.studio.gate import HOST, ORIGINS
from tap_eval.mistake import Mistake

STUDIO = "https://smith.langchain.com/studio/?baseUrl="
_DEFAULTS = {"LANGGRAPH_NO_VERSION_CHECK": "true", "LOG_LEVEL": "ERROR", "CORS_ALLOW_ORIGINS": ORIGINS}
"""the server's environment where ours says nothing"""
_PAUSE = 2.0  # seconds between two looks for new runs
_GRACE = 5.0  # seconds that what runs has to stop, and the server to end


class StudioMistake(Mistake):
    """A server that is not installed, or not whole."""

    kind = "studio"


def serve(folder: Path, host: str, port: int, *, browser: bool, tell: Callable[[str], None]) -> None:
    """Runs the server until it is interrupted; `tell` is given the addresses once it answers.

    The runs under `folder` are listed as threads, those that begin meanwhile too. Raises
    `StudioMistake` and `PortMistake` before anything is started, `RuntimeError` when the server
    ends by itself.
    """
    if find_spec("langgraph_cli") is None or find_spec("langgraph_api") is None:
        raise StudioMistake("the LangGraph server is not installed: `pip install -e '.[studio]'` brings it.")
    if not CONFIG.is_file():
        raise StudioMistake(f"{CONFIG} is not there: run tap-agent from a checkout, installed with `pip install -e`.")
    with listen(host, port) as free:
        port = free.getsockname()[1]
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 it is named, not bound
    url = f"http://[{near}]:{port}" if ":" in near else f"http://{near}:{port}"
    path = os.pathsep.join(filter(None, [str(CONFIG.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "tap_agent.studio.dev", host, str(port), *(["browser"] if browser else [])]
    server = subprocess.Popen(  # noqa: S603 in a session of its own, so that Ctrl-C reaches it through us alone
        command,
        env={**_DEFAULTS, **os.environ, "PYTHONPATH": path, HOST: host},
        stdout=sys.stderr,
        start_new_session=True,
    )
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in heard}
    try:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            try:
                _list_runs(folder, client, server, lambda: tell(f"Studio: {STUDIO}{url}\nAPI: {url}, see {url}/docs"))
            except KeyboardInterrupt:
                _end(client, server)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        server.kill()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _list_runs(folder: Path, client: httpx.Client, server: subprocess.Popen[bytes], up: Callable[[], None]) -> NoReturn:
    """Keeps the server's threads like the runs; calls `up` once it answers."""
    known: dict[str, str] = {}
    answers = False
    while server.poll() is None:
        if not answers and (answers := _answers(client)):
            up()
        for thread, (graph, names) in _threads(folder).items() if answers else ():
            if known.get(thread) != names:
                about = {"graph_id": graph, "run": names}
                client.post("/threads", json={"thread_id": thread, "metadata": about, "if_exists": "do_nothing"})
                client.patch(f"/threads/{thread}", json={"metadata": about})
                known[thread] = names
        time.sleep(_PAUSE if answers else 0.2)
    raise RuntimeError(f"the server has ended by itself, with status {server.returncode}; it has said why")


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/ok").is_success
    except httpx.TransportError:
        return False


def _threads(folder: Path) -> dict[str, tuple[str, str]]:
    """The graph of each thread, and the names of its runs, the oldest first."""
    found: dict[str, tuple[str, str]] = {}
    for run in reversed(runs(folder)):
        if tip := tip_of(run):
            names = f"{found[tip.thread][1]}, {run.name}" if tip.thread in found else run.name
            found[tip.thread] = "search", names
        found |= dict.fromkeys(conversations(run), ("refinement", run.name))
    return found


def _end(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    """Stops what runs, so that it is not begun again with the next start, then the server.

    An agent that waits for its language model is not waited for: what it would say is lost, and
    asked for again when the run is resumed.
    """
    until = time.monotonic() + _GRACE
    if _answers(client):
        for thread in _busy(client):  # one by one, since "all" reaches none that runs
            running = [run["run_id"] for run in client.get(f"/threads/{thread}/runs").json()]
            client.post("/runs/cancel", json={"thread_id": thread, "run_ids": running})
        while _busy(client) and time.monotonic() < until:
            time.sleep(0.1)
    server.send_signal(signal.SIGINT)
    try:
        server.wait(_GRACE)
    except subprocess.TimeoutExpired:
        server.kill()
    server.wait()


def _busy(client: httpx.Client) -> list[str]:
    return [thread["thread_id"] for thread in client.post("/threads/search", json={"status": "busy"}).json()]
