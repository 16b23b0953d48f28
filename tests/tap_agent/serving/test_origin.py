"""Whose requests a server takes, asked as browsers and programs ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from tap_agent.serving.origin import SameOrigin

HERE = "127.0.0.1:7860"
STUDIO = "https://studio.example"


def client(host: str | None = "127.0.0.1", others: Sequence[str] = ()) -> TestClient:
    async def talk(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    def answer(request: Request) -> Response:
        return Response(status_code=204)

    routes = [Route("/", answer, methods=["GET", "POST", "OPTIONS"]), WebSocketRoute("/", talk)]
    app = Starlette(routes=routes, middleware=[Middleware(SameOrigin, host=host, others=others)])
    return TestClient(app, base_url=f"http://{HERE}")


@pytest.mark.parametrize(
    ("host", "asked", "status"),
    [
        ("127.0.0.1", "127.0.0.1:7860", 204), ("127.0.0.1", "LocalHost", 204), ("127.0.0.1", "[::1]:7860", 204),
        ("127.0.0.1", "evil.example", 421), ("127.0.0.1", "localhost:17860.evil.example", 421),
        ("127.0.0.1", "localhost.evil.example", 421), ("127.0.0.1", "evil.example@localhost", 421),
        ("127.0.0.1", "localhost#evil.example", 421), ("127.0.0.1", "[::1", 421), ("127.0.0.1", "", 421),
        ("127.0.0.1", "192.0.2.7", 421), ("0.0.0.0", "192.0.2.7:2024", 204), ("0.0.0.0", "localhost:2024", 204),
        ("0.0.0.0", "evil.example", 421), ("box.example", "box.example", 204), (None, "box.example", 204),
    ],
)  # fmt: skip
def test_a_name_that_another_may_let_resolve_to_this_machine_is_not_served(
    host: str | None, asked: str, status: int
) -> None:
    assert client(host).get("/", headers={"Host": asked}).status_code == status


OTHER = {"Origin": "http://evil.example"}
CASES: list[tuple[str, dict[str, str], int]] = [
    ("POST", {}, 204),
    ("POST", {"Origin": f"http://{HERE}", "Sec-Fetch-Site": "same-origin"}, 204),
    ("POST", OTHER, 403),
    ("POST", {"Origin": "null"}, 403),
    ("POST", {"Origin": "http://[::1"}, 403),
    ("POST", {"Origin": f"http://{HERE}.evil.example"}, 403),
    ("POST", {"Origin": "http://127.0.0.1:9999", "Sec-Fetch-Site": "same-site"}, 403),
    ("POST", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, 403),
    ("POST", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "document"}, 403),
    ("POST", {"Sec-Fetch-Dest": "document"}, 403),
    ("POST", {"Sec-Fetch-Dest": "iframe"}, 403),
    ("GET", {"Sec-Fetch-Dest": "iframe"}, 403),
    ("GET", {"Sec-Fetch-Dest": "document"}, 204),
    ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, 204),
    ("GET", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}, 403),
    ("GET", {"Sec-Fetch-Site": "none", "Sec-Fetch-Dest": "document"}, 204),
    ("POST", {"Origin": STUDIO, "Sec-Fetch-Site": "cross-site"}, 204),
    ("OPTIONS", OTHER, 204),
]


@pytest.mark.parametrize(("method", "headers", "status"), CASES)
def test_what_another_sites_page_sends_is_refused(method: str, headers: dict[str, str], status: int) -> None:
    assert client(others=[STUDIO]).request(method, "/", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("headers", "taken"),
    [({}, True), ({"Origin": f"http://{HERE}"}, True), ({"Origin": STUDIO}, True), (OTHER, False),
     ({"Host": "evil.example"}, False), ({"Origin": "null"}, False)],
)  # fmt: skip
def test_a_websocket_is_opened_by_the_same_rule(headers: dict[str, Any], taken: bool) -> None:
    with (
        pytest.raises(WebSocketDisconnect) as ended,
        client(others=[STUDIO]).websocket_connect(f"ws://{HERE}/", headers=headers) as socket,
    ):
        socket.receive_text()
    assert (ended.value.code == 1000) == taken
