"""The real E2B client against a local server that speaks E2B's protocol and really runs the code."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tap_eval.proxies.proxy import Failure, Rejection
from tests.tools.e2b_server import E2BServer
from tools.e2b import E2BSandbox
from tools.sandbox import JSON, Limits, SandboxError

LIMITS = Limits(seconds=1.0, memory_bytes=64 * 2**20, result_bytes=64 * 2**10)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[E2BServer]:
    with E2BServer() as running:
        monkeypatch.setenv("E2B_API_KEY", "e2b_0000")
        monkeypatch.setenv("E2B_API_URL", running.url)
        monkeypatch.setenv("E2B_SANDBOX_URL", running.url)
        yield running


@pytest.fixture
def sandbox(server: E2BServer) -> Iterator[E2BSandbox]:
    with E2BSandbox(LIMITS) as opened:
        yield opened


def test_a_proxy_runs_on_one_machine_that_ends_with_the_sandbox(server: E2BServer) -> None:
    code = "from math import log\ndef sensitivity(layers, task): return [log(x['n']) for x in layers]"
    layers: list[JSON] = [{"n": 1}, {"n": 1.0}, {"n": float("inf"), "name": "\"'\\\n☃😀"}]
    with E2BSandbox(LIMITS) as opened:
        for _ in range(2):
            assert opened.run(code, "sensitivity(layers, {})", {"layers": layers}) == [0.0, 0.0, float("inf")]
        assert len(server.machines) == 1
    assert server.machines == set()
    assert server.started == 1


def test_plain_data_comes_back(sandbox: E2BSandbox) -> None:
    call = "(1, [2.5, (True, None)], {'a': {'b': x}})"
    assert sandbox.run("", call, {"x": "☃😀\n"}) == [1, [2.5, [True, None]], {"a": {"b": "☃😀\n"}}]
    assert str(sandbox.run("", "[float('nan')]", {})) == "[nan]"


DEATHS = {
    Failure.ERROR: ["raise SystemExit", "return left", "import os\n os.kill(os.getppid(), 9)"],
    Failure.TIMEOUT: ["import time\n time.sleep(60)"],
    Failure.MEMORY: ["import os\n os._exit(1)", "import os\n os.abort()"],
    Failure.WRONG_SHAPE: ["import os\n os.write(1, b'?')"],
}
"""what only CPython can do; `tests/hostile` has the rest"""


@pytest.mark.parametrize(("body", "death"), [(body, death) for death in DEATHS for body in DEATHS[death]])
def test_a_death_has_its_name(sandbox: E2BSandbox, body: str, death: Failure) -> None:
    assert sandbox.run("left = 1", "left", {}) == 1
    answer = sandbox.run(f"def f():\n {body}", "f()", {})
    assert isinstance(answer, Rejection)
    assert answer.failure is death
    assert sandbox.run("", "1 + 1", {}) == 2


def test_a_message_names_the_line_and_the_exception(sandbox: E2BSandbox) -> None:
    answer = sandbox.run("def f(x):\n    return x[9]", "f([1])", {})
    assert answer == Rejection(Failure.ERROR, "line 2: IndexError: list index out of range")


def test_the_candidate_gets_no_environment_of_the_machine(sandbox: E2BSandbox) -> None:
    answer = sandbox.run("import os", "[name for name in os.environ if name.startswith('E2B')]", {})
    assert answer == []


def test_sets_of_strings_have_one_order(sandbox: E2BSandbox) -> None:
    call = "list({str(i) for i in range(99)})"
    assert sandbox.run("", call, {}) == sandbox.run("", call, {})


def test_a_machine_that_has_ended_is_replaced(server: E2BServer, sandbox: E2BSandbox) -> None:
    server.machines.clear()
    assert sandbox.run("", "1 + 1", {}) == 2
    assert server.started == 2


def test_a_machine_that_stops_answering_is_replaced(server: E2BServer, sandbox: E2BSandbox) -> None:
    assert sandbox.run("import os\nos.kill(os.getppid(), 19)", "1", {}) == LIMITS.hit(Failure.TIMEOUT)
    assert server.machines == set()
    assert sandbox.run("", "1 + 1", {}) == 2
    assert server.started == 2


def test_threads_take_turns(sandbox: E2BSandbox) -> None:
    def squared(number: int) -> object:
        return sandbox.run("", "x * x", {"x": number})

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(squared, range(8))) == [number**2 for number in range(8)]


def test_without_a_key_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("E2B_API_KEY", raising=False)
    with pytest.raises(SandboxError, match="E2B_API_KEY is not set"):
        E2BSandbox()


def test_an_unreachable_server_is_an_error(server: E2BServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2B_API_URL", "http://127.0.0.1:9")
    with pytest.raises(SandboxError, match="no E2B machine starts"):
        E2BSandbox()
