"""How work that takes long is told."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[str, int, int], None]
"""Told of work that takes long: what it is, how much is done, of how much."""


def silent(_: str, __: int, ___: int) -> None:
    """Tells nobody."""
