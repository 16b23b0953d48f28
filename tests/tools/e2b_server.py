"""A server that speaks E2B's protocol over plain HTTP and really runs the code, for tests only.

It is no sandbox: the code runs on this computer as this user, in a process group that is ended after a time
limit. `machines` and `started` let a test see what the client did, and `misbehaves` names what is wrong with it.
"""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast

RUNNING: dict[str, Callable[[_Handler], None]] = {
    "fails": lambda of: of.send(500, b'{"code": 500, "message": "sk-secret"}'),
    "is busy": lambda of: of.send(503, b"busy"),
    "has lost the machine": lambda of: of.send(502, b"no such sandbox"),
    "knows no machine": lambda of: of.send(404, b"not found"),
    "refuses the key": lambda of: of.send(401, b'{"code": 401, "message": "e2b_0000_of_a_test"}'),
    "sends a page": lambda of: of.send(200, b"<html>Sign in</html>"),
    "sends bytes": lambda of: of.send(200, b"\xff\xfe\0" * 99),
    "sends no events": lambda of: of.send(200, b'5\n[]\n"x"\n{}\n'),
    "sends no objects": lambda of: of.send(200, b"null\n"),
    "sends other events": lambda of: of.send(200, b'{"type": "stdout", "text": 5, "timestamp": null}\n'),
    "sends half an event": lambda of: of.send(200, b'{"type": "stdo'),
    "nests without end": lambda of: of.send(200, b"[" * 100_000),
    "says nothing": lambda of: of.send(200, b""),
    "breaks off": lambda of: of.send(200, b'{"type": "stdout", "text": "', missing=99),
    "packs": lambda of: of.send(200, gzip.compress(b"x" * 2**20), **{"Content-Encoding": "gzip"}),
    "floods": lambda of: of.flood(b'{"type": "stdout", "text": "' + b"x" * 2**16 + b'", "timestamp": 1}\n'),
    "sends a line without end": lambda of: of.flood(b"x" * 2**16),
    "hangs": lambda of: of.hang(),
}
"""what is wrong with a server that runs code"""
STARTING = {name: RUNNING[name] for name in ("fails", "refuses the key", "sends a page", "sends bytes", "breaks off")}
"""what may be wrong with it already where it starts machines"""


class E2BServer(ThreadingHTTPServer):
    """Listens on a free port of localhost from `with` on; `url` serves both the API and the machines."""

    daemon_threads = True

    def __init__(self, seconds: float = 20.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seconds = seconds
        self.machines: set[str] = set()
        self.started = 0
        self.misbehaves: Callable[[_Handler], None] | None = None
        """in place of running code"""
        self.starts: Callable[[_Handler], None] | None = None
        """in place of starting a machine"""
        self.going = threading.Event()
        self._running: list[subprocess.Popen[str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()  # polls every 20 ms
        return self

    def __exit__(self, *_: object) -> None:
        self.going.set()
        self.shutdown()
        self.server_close()
        for process in self._running:
            process.kill()

    def execute(self, code: str) -> list[dict[str, Any]]:
        """The events of one execution: what was printed, an error if it failed, and the count."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-S", "-"], stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        self._running.append(process)
        try:
            out, err = process.communicate(code, timeout=self.seconds)
        except subprocess.TimeoutExpired:
            out, err = "", "timeout"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        events: list[dict[str, Any]] = [{"type": "stdout", "text": out, "timestamp": time.time_ns()}]
        if process.wait() != 0:
            events.append({"type": "error", "name": "Failed", "value": err[-200:], "traceback": err})
        return [*events, {"type": "number_of_executions", "execution_count": 1}]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(204)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.asked = json.loads(self.rfile.read(length) or b"{}")
        server = cast(E2BServer, self.server)
        if self.path.endswith("/v2/sandboxes") and server.starts:
            server.starts(self)
        elif self.path == "/execute" and server.misbehaves:
            server.misbehaves(self)
        elif self.path.endswith("/v2/sandboxes"):
            name = uuid.uuid4().hex
            server.machines.add(name)
            server.started += 1
            made = {"templateID": "t", "sandboxID": name, "clientID": "c", "envdVersion": "1.0.0"}
            self._answer(201, {**made, "envdAccessToken": "token", "domain": None})
        elif self.path.endswith("/timeout"):
            self._found(self.path.split("/")[-2] in server.machines)
        elif self.path == "/execute" and self.headers["E2b-Sandbox-Id"] in server.machines:
            self.execute()
        else:
            self._found(False)

    def execute(self) -> None:
        """Runs the code that was sent, as a server should."""
        self._answer(200, *cast(E2BServer, self.server).execute(self.asked["code"]))

    def do_DELETE(self) -> None:
        server = cast(E2BServer, self.server)
        name = self.path.split("/")[-1]
        known = name in server.machines
        server.machines.discard(name)
        self._found(known)

    def _found(self, found: bool) -> None:
        if found:
            self._answer(204)
        else:
            self._answer(404, {"code": 404, "message": "not found"})

    def _answer(self, status: int, *objects: dict[str, Any]) -> None:
        self.send(status, "".join(json.dumps(entry) + "\n" for entry in objects).encode())

    def send(self, status: int, body: bytes, missing: int = 0, **headers: str) -> None:
        """Sends `body`, of which so many bytes are `missing` at its end, where the connection breaks off."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.close_connection or bool(missing)

    def flood(self, part: bytes) -> None:
        """Sends `part` again and again, until nobody listens."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.close_connection = True
        with suppress(OSError):
            while not cast(E2BServer, self.server).going.is_set():
                self.wfile.write(part)

    def hang(self) -> None:
        """Says nothing for as long as the server is there."""
        cast(E2BServer, self.server).going.wait()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
