"""Who may ask the server behind Studio, which has no password: a search can import code, and browsers run any page."""

from __future__ import annotations

import os

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tap_agent.port import is_address, is_loopback, name_of

ORIGINS = "https://smith.langchain.com,https://eu.smith.langchain.com"
"""the pages that are Studio; the variable `CORS_ALLOW_ORIGINS` names others"""
HOST = "TAP_STUDIO_HOST"
"""the variable with the address that the server listens on"""


class Gate:
    """Refuses what other sites' pages send, and every name but this machine's.

    Without the first, any page could start a search, since a plain text needs no leave from the
    server; without the second, one whose name resolves to the loopback could read the answers too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._origins = os.environ.get("CORS_ALLOW_ORIGINS", ORIGINS).split(",")
        self._host = os.environ.get(HOST, "127.0.0.1")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or hands on."""
        refusal = self._refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (PlainTextResponse(refusal, 403) if refusal else self._app)(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = name_of(host)
        if not (
            is_loopback(name) if is_loopback(self._host) else is_address(name) or name in ("localhost", self._host)
        ):
            return f"'{host}' is not served: ask for {self._host}, or for the machine's address, with the port.\n"
        if method == "OPTIONS" or origin is None or "*" in self._origins or origin in self._origins:
            return None
        return None if origin.partition("://")[2] == host else f"{origin} is not Studio, and is refused.\n"


app = Starlette(middleware=[Middleware(Gate)])
