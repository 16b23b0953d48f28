"""Keys that servers are given, of which nothing that they say back is kept."""

from __future__ import annotations

from typing import Any

SHORTEST = 8
"""characters of a key that is looked for: "none" and "local" are keys too, and words"""


def redacted(value: Any, key: str) -> Any:
    """`value`, plain data, with `***` wherever a text holds `key`, unless that is short enough to be a word."""
    if len(key) < SHORTEST:
        return value
    match value:
        case str():
            return value.replace(key, "***")
        case dict():
            return {redacted(name, key): redacted(each, key) for name, each in value.items()}
        case list():
            return [redacted(each, key) for each in value]
        case _:
            return value
