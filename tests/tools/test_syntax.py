"""Code is read as it is, whatever else goes on."""

from __future__ import annotations

import ast
import gc

import pytest

from tools.syntax import parse

CODE = "\n".join(f"x = [a + (b * (c - {place})) for a in range({place})]" for place in range(60))


@pytest.mark.parametrize("collection", [2, 20])
def test_code_is_read_while_other_code_is_read(collection: int) -> None:
    """As by another thread, which may come in between whenever objects are collected."""
    came = 0

    def read_other(phase: str, info: object) -> None:
        nonlocal came
        came += 1
        if came == collection:
            ast.parse("y = [1, (2, [3])]")

    often = gc.get_threshold()
    gc.callbacks.append(read_other)
    gc.set_threshold(20)
    try:
        found = parse(CODE)
    finally:
        gc.callbacks.remove(read_other)
        gc.set_threshold(*often)
    assert came >= collection
    assert len(found.body) == 60
