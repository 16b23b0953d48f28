"""The real client of E2B against a server that misbehaves: what is lost is named, and the next job is right."""

from __future__ import annotations

from typing import Any

import pytest

from tap_eval.proxies.proxy import LONGEST_MESSAGE, Failure, Rejection
from tests.hostile.conftest import E2B_KEY, LIMITS
from tests.hostile.memory import taking_at_most
from tests.hostile.snippets import CALL, LAYERS, SNIPPETS
from tests.hostile.test_snippets import GOOD, computes
from tests.tools.e2b_server import RUNNING, STARTING, E2BServer
from tools.e2b import E2BSandbox
from tools.sandbox import SandboxError

MEMORY = 2**27
"""bytes that this process may take for one run, whatever the server sends: eight times the longest reply"""
INPUTS: dict[str, Any] = {"layers": LAYERS, "task": {}}
SENT = [snippet for snippet in SNIPPETS if not snippet.refused]


@pytest.mark.parametrize("name", RUNNING)
def test_whatever_a_server_makes_of_a_run_is_a_failure_with_a_name(
    name: str, server: E2BServer, e2b: E2BSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.e2b._GRACE", 0.3)  # which a server that hangs takes twice
    for snippet in SENT[list(RUNNING).index(name) :: len(RUNNING)]:
        server.misbehaves = RUNNING[name]
        try:
            with taking_at_most(MEMORY):
                found = e2b.run(snippet.code, CALL, INPUTS)
            assert isinstance(found, Rejection)
            said = found.message
        except SandboxError as error:
            said = str(error)
            assert "the network, the key and the quota" in said or "take the default sandbox" in said
        assert 0 < len(said) <= LONGEST_MESSAGE
        assert said.isprintable()
        assert E2B_KEY not in said
        server.misbehaves = None
        assert computes(e2b)


@pytest.mark.parametrize("name", STARTING)
def test_a_server_that_starts_no_machine_is_a_sentence_without_the_key(
    name: str, server: E2BServer, e2b: E2BSandbox
) -> None:
    server.starts = STARTING[name]
    server.machines.clear()
    with pytest.raises(SandboxError, match="no E2B machine starts") as running:
        e2b.run(GOOD, CALL, INPUTS)
    with pytest.raises(SandboxError, match="no E2B machine starts") as starting:
        E2BSandbox(LIMITS)
    server.starts = None
    for raised in (running, starting):
        assert E2B_KEY not in str(raised.value)
        assert len(str(raised.value)) < LONGEST_MESSAGE
    assert computes(e2b)


def test_a_machine_that_is_lost_once_costs_nothing(server: E2BServer, e2b: E2BSandbox) -> None:
    def once(handler: Any) -> None:
        server.misbehaves = None
        RUNNING["has lost the machine"](handler)

    server.misbehaves = once
    assert computes(e2b)


def test_code_that_loses_every_machine_costs_itself_alone(server: E2BServer, e2b: E2BSandbox) -> None:
    def mortal(handler: Any) -> None:
        if "KILL" in handler.asked["code"]:
            RUNNING["has lost the machine"](handler)
        else:
            handler.execute()

    server.misbehaves = mortal
    found = e2b.run(f"# KILL\n{GOOD}", CALL, INPUTS)
    assert found == Rejection(Failure.ERROR, "it stopped the machine from answering.")
    assert computes(e2b)
    server.misbehaves = None
