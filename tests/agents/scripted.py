"""A server that speaks OpenAI's chat protocol and answers from a script, so that the real client is driven."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast

Answer = dict[str, Any]


def proposal(thought: str, code: str) -> Answer:
    """The call with which an agent submits."""
    return tool_call("Proposal", thought=thought, code=code)


def tool_call(name: str, /, **arguments: object) -> Answer:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }


def refusal(status: int, words: object, **headers: str) -> Answer:
    """An error in place of an answer."""
    return {"status": status, "words": words, "headers": headers}


class ChatServer(ThreadingHTTPServer):
    """Listens on a free port of localhost; `script` maps a request to an answer, and `asked` keeps the requests.

    Each answer takes `delay` seconds, and comes once `answers` is set; one that `dribbles` never ends, though something
    comes all the time.
    An answer with a `finish_reason` ends for that reason; of one that is `half` the rest never comes.
    In the Responses API it answers `response`.
    """

    daemon_threads = True

    def __init__(self, script: Callable[[dict[str, Any]], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock = threading.Lock()
        self.refuses = False
        self.delay = 0.0
        self.answers = threading.Event()
        self.answers.set()
        self.dribbles = False
        self.connections: set[socket.socket] = set()
        self.models: list[str] = []
        self.response: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Not there for as long as this lasts: connections are refused, and those that there are end."""
        self.__exit__()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        yield
        self.socket = socket.socket(self.address_family, self.socket_type)
        self.server_bind()
        self.server_activate()
        self.__enter__()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of whoever has not waited for an answer."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        cast(ChatServer, self.server).connections.add(self.connection)

    def finish(self) -> None:
        cast(ChatServer, self.server).connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        server = cast(ChatServer, self.server)
        self._answer(401 if server.refuses else 200, {"data": [{"id": name} for name in server.models]})

    def do_POST(self) -> None:
        server = cast(ChatServer, self.server)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(request)
            server.keys.append(self.headers["Authorization"].removeprefix("Bearer "))
            message = server.script(request)
        time.sleep(server.delay)
        server.answers.wait()
        if "status" in message:
            self._answer(message["status"], {"error": {"message": message["words"]}}, message["headers"])
            return
        if "raw" in message:
            self._send(200, message["raw"], message.get("headers", {}))
            return
        if "floods" in message:
            self._flood()
            return
        if server.dribbles:
            self._dribble()
            return
        if "input" in request:
            body = {"id": "x", "object": "response", "created_at": 0, "model": "scripted", "status": "completed"}
            body |= {"output": server.response, "usage": {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}}
            self._answer(200, body | {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []})
            return
        if "half" in message:
            self._send(200, message["half"], {"Content_Length": str(2 * len(message["half"]))})
            self.close_connection = True
            return
        finish = message.pop("finish_reason", "tool_calls" if "tool_calls" in message else "stop")
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "scripted", "choices": [choice]}
        if request.get("stream"):
            self._stream(message, finish, usage if request.get("stream_options") else None)
        else:
            self._answer(200, body | {"usage": usage})

    def _flood(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}}]})

    def _dribble(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)

    def _stream(self, message: Answer, finish: str, usage: Answer | None) -> None:
        """The answer word by word, as server-sent events; a `broken` one ends in the middle."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        words = re.findall(r"\S+\s*", message.get("content") or "")
        deltas: list[Answer] = [{"role": "assistant", "content": word} for word in words]
        calls = [{"index": place, **call} for place, call in enumerate(message.get("tool_calls", []))]
        deltas += [{"role": "assistant", "content": None, "tool_calls": calls}] if calls else []
        deltas += [{name: message[name]} for name in ("reasoning_content", "refusal") if name in message]
        for delta in deltas:
            self._event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        if not message.get("broken"):
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
            if usage:
                self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, content: dict[str, Any]) -> None:
        body = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "scripted", **content}
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), headers or {})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        sent = {"Content_Type": "application/json", "Content_Length": str(len(body))} | dict(headers)
        for name, value in sent.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
