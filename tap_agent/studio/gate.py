"""Who may ask the server behind Studio, which has no password: a search can import code, and browsers run any page."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tap_agent.port import is_loopback

ORIGINS = "https://smith.langchain.com,https://eu.smith.langchain.com"
"""the pages that are Studio; the variable `CORS_ALLOW_ORIGINS` names others"""
HOST = "TAP_STUDIO_HOST"
"""the variable with the address that the server listens on"""


class Gate:
    """Refuses what other sites' pages send, and on the loopback every name but its own.

    Without the first, any page could start a search, since a plain text needs no leave from the
    server; without the second, one whose name resolves to the loopback could read the answers too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._origins = os.environ.get("CORS_ALLOW_ORIGINS", ORIGINS).split(",")
        self._local = is_loopback(os.environ.get(HOST, "127.0.0.1"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or hands on."""
        refusal = self._refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (PlainTextResponse(refusal, 403) if refusal else self._app)(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return f"'{host}' is not served: open http://127.0.0.1 with the port.\n"
        if method == "OPTIONS" or origin is None or "*" in self._origins or origin in self._origins:
            return None
        return None if urlsplit(origin).netloc == host else f"{origin} is not Studio, and is refused.\n"


app = Starlette(middleware=[Middleware(Gate)])
