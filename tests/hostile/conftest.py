"""Two sandboxes for everything here, so that little time goes into starting them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tools.e2b_server import E2BServer
from tools.e2b import E2BSandbox
from tools.sandbox import Limits, MontySandbox

LIMITS = Limits(seconds=1.0, memory_bytes=64 * 2**20, result_bytes=64 * 2**10, result_lists=2**12)
E2B_KEY = "e2b_0000_of_a_test"


@pytest.fixture(scope="session")
def monty() -> Iterator[MontySandbox]:
    with MontySandbox(LIMITS) as opened:
        yield opened


@pytest.fixture(scope="module")
def server() -> Iterator[E2BServer]:
    with E2BServer() as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("E2B_API_KEY", E2B_KEY)
        patch.setenv("E2B_API_URL", running.url)
        patch.setenv("E2B_SANDBOX_URL", running.url)
        yield running


@pytest.fixture(scope="module")
def e2b(server: E2BServer) -> Iterator[E2BSandbox]:
    with E2BSandbox(LIMITS) as opened:
        yield opened
