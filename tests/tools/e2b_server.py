"""A server that speaks E2B's protocol over plain HTTP and really runs the code, for tests only.

It is no sandbox: the code runs on this computer as this user, in a process group that is ended after a time
limit. `machines` and `started` let a test see what the client did.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast


class E2BServer(ThreadingHTTPServer):
    """Listens on a free port of localhost from `with` on; `url` serves both the API and the machines."""

    daemon_threads = True

    def __init__(self, seconds: float = 20.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seconds = seconds
        self.machines: set[str] = set()
        self.started = 0
        self._running: list[subprocess.Popen[str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()  # polls every 20 ms
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        for process in self._running:
            process.kill()

    def execute(self, code: str) -> list[dict[str, Any]]:
        """The events of one execution: what was printed, an error if it failed, and the count."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-"], stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
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
        body = json.loads(self.rfile.read(length) or b"{}")
        server = cast(E2BServer, self.server)
        if self.path.endswith("/v2/sandboxes"):
            name = uuid.uuid4().hex
            server.machines.add(name)
            server.started += 1
            made = {"templateID": "t", "sandboxID": name, "clientID": "c", "envdVersion": "1.0.0"}
            self._answer(201, {**made, "envdAccessToken": "token", "domain": None})
        elif self.path.endswith("/timeout"):
            self._found(self.path.split("/")[-2] in server.machines)
        elif self.path == "/execute" and self.headers["E2b-Sandbox-Id"] in server.machines:
            self._answer(200, *server.execute(body["code"]))
        else:
            self._found(False)

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
        body = "".join(json.dumps(entry) + "\n" for entry in objects).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
