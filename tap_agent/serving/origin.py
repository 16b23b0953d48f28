"""Whose requests a server takes: those of its own pages and of programs, not those of other sites' pages.

A browser runs any page, and lets each send forms, and open WebSockets, to this machine.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from tap_agent.serving.address import is_address, is_loopback, name_of

_POLICY_VIOLATION = 1008


class SameOrigin:
    """Refuses requests for names that are not served, with status 421, and what pages of other sites send, with 403.

    Without the first, a page elsewhere whose name resolves to this machine could read and send;
    without the second, any page could start a search, since a form needs no leave from the server.
    """

    def __init__(self, app: ASGIApp, host: str | None, others: Collection[str] = ()) -> None:
        """`host` is what is listened on, or None to serve every name; `others` are origins that may send, or `*`."""
        self._app = app
        self._host = host
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or hands on."""
        app = self._app
        if scope["type"] in ("http", "websocket"):
            headers = Headers(scope=scope)
            if sentence := self._misdirected(headers.get("host", "")):
                app = PlainTextResponse(sentence, 421)
            elif sentence := self._foreign(scope.get("method", "websocket"), headers):
                app = PlainTextResponse(sentence, 403)
            if sentence and scope["type"] == "websocket":
                app = WebSocketClose(_POLICY_VIOLATION, sentence)
        await app(scope, receive, send)

    def _misdirected(self, host: str) -> str | None:
        name = name_of(host)
        if self._host is None or is_loopback(name):
            return None
        if is_loopback(self._host):
            return f"'{host}' is not served: ask for {self._host} with the port.\n"
        if is_address(name) or name == self._host:
            return None
        return f"'{host}' is not served: ask for the machine's address with the port.\n"

    def _foreign(self, method: str, headers: Headers) -> str | None:
        origin, destination = headers.get("origin"), headers.get("sec-fetch-dest")
        # a program says neither; a browser that says what it asks for says from where
        site = headers.get("sec-fetch-site", "none" if destination is None else "unknown")
        if method == "OPTIONS" or "*" in self._others or (origin and origin in self._others):
            return None
        if origin is not None and origin.partition("://")[2] != headers.get("host", ""):
            return f"What {origin} sends is not taken here.\n"
        followed = method == "GET" and destination == "document"  # a link from elsewhere to here
        if origin is None and site not in ("none", "same-origin") and not followed:
            return "Nothing here is part of another site's page.\n"
        return None
