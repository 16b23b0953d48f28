"""The password of the page, and what its answers may load."""

from __future__ import annotations

import asyncio
import base64
import secrets

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

_PAGE = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
REPORT = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; form-action 'none'"
)
"""for the report, a single file with its scripts in it, which are kept apart from the page"""
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin", "Cache-Control": "no-store"}
_WRONG_PASSWORD_SECONDS = 1.0


class Guard(BaseHTTPMiddleware):
    """Asks for the password where there is one."""

    def __init__(self, app: ASGIApp, password: str | None) -> None:
        super().__init__(app)
        self._password = password
        self._wrong = asyncio.Lock()

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Refuses, or hands on."""
        if self._password is not None and not _knows(request.headers.get("authorization", ""), self._password):
            if "authorization" in request.headers:
                async with self._wrong:  # one after another, however many are tried side by side
                    await asyncio.sleep(_WRONG_PASSWORD_SECONDS)
            asks = {"WWW-Authenticate": 'Basic realm="TAP", charset="UTF-8"'}
            return PlainTextResponse("The password is needed; any user name will do.\n", 401, asks)
        answer = await call_next(request)
        for name, value in {**_HEADERS, "Content-Security-Policy": _PAGE}.items():
            answer.headers.setdefault(name, value)
        return answer


def _knows(authorization: str, password: str) -> bool:
    """Whether HTTP Basic credentials hold the password, whatever the user name."""
    kind, _, encoded = authorization.partition(" ")
    try:
        given = base64.b64decode(encoded, validate=True).partition(b":")[2]
    except ValueError:
        return False
    return kind.lower() == "basic" and secrets.compare_digest(given, password.encode())
