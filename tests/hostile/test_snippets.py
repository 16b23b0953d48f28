"""Each snippet ends in an ordinary failure that has a name, in every sandbox, and costs nobody else anything."""

from __future__ import annotations

from typing import Any

import pytest

from tap_eval.proxies.proxy import LONGEST_MESSAGE, Failure, Rejection, checked_scores
from tests.hostile.memory import taking_at_most
from tests.hostile.snippets import CALL, LAYERS, SNIPPETS, UNREADABLE, Snippet
from tools.e2b import E2BSandbox
from tools.sandbox import MontySandbox, Sandbox, forbidden

MEMORY = 64 * 2**20
"""bytes that this process may take for one run, be the code what it may"""
GOOD = "def sensitivity(layers, task):\n    return [layer['std'] for layer in layers]\n"


def ended(snippet: Snippet, sandbox: Sandbox) -> Rejection:
    """How it ends where nothing reads the code before, which is what the sandbox alone is worth."""
    inputs: dict[str, Any] = {"layers": LAYERS, "task": {"classes": 2}}
    value = sandbox.run(snippet.code, CALL, inputs)
    found = value if isinstance(value, Rejection) else checked_scores(value, [2, 2], by_channel=True)
    assert isinstance(found, Rejection), found
    return found


def computes(sandbox: Sandbox) -> bool:
    """What needs milliseconds is given its second up to three times: a machine may hold everything up for one."""
    return any(sandbox.run(GOOD, CALL, {"layers": LAYERS, "task": {}}) == [1.0, 2.0] for _ in range(3))


def check(snippet: Snippet, sandbox: Sandbox) -> None:
    with taking_at_most(MEMORY):
        found = ended(snippet, sandbox)
    assert found.failure in (*snippet.ends, Failure.TIMEOUT), found  # its second may be too short on a loaded machine
    assert 0 < len(found.message) <= LONGEST_MESSAGE
    assert found.message.isprintable()
    assert computes(sandbox)


def test_there_are_many_and_no_two_are_the_same() -> None:
    assert len({snippet.name for snippet in SNIPPETS}) == len({snippet.body for snippet in SNIPPETS}) == len(SNIPPETS)
    assert len(SNIPPETS) >= 100


@pytest.mark.parametrize("snippet", [*SNIPPETS, *UNREADABLE], ids=lambda snippet: snippet.name)
def test_the_list_on_the_host_refuses_what_reaches_out(snippet: Snippet) -> None:
    found = forbidden(snippet.code)
    assert (found and found.failure) == snippet.refused


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.name)
def test_monty_alone_ends_it_by_name(snippet: Snippet, monty: MontySandbox) -> None:
    check(snippet, monty)


@pytest.mark.parametrize(
    "snippet", [snippet for snippet in SNIPPETS if not snippet.refused], ids=lambda snippet: snippet.name
)
def test_a_machine_of_e2bs_ends_by_name_what_the_list_lets_through(snippet: Snippet, e2b: E2BSandbox) -> None:
    check(snippet, e2b)
