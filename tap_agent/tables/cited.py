"""Figures of papers, which stand beside what was measured here and never in its place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from tap_agent.tables.line import Figure, Line

_ANY = "any"
"""a network that the paper does not name"""
_WORDS = ("row", "bits", "sees", "variant", "note")


@cache
def _data() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((files(__package__) / "cited.yaml").read_text())
    return found | {"tables": {str(number): table for number, table in found["tables"].items()}}


def tables() -> list[str]:
    """The tables of the paper of which there are figures, as a plan names them."""
    return list(_data()["tables"])


def cited(names: Sequence[str]) -> list[Line]:
    """The lines of these tables, each with its source and, as far as it is known, its protocol."""
    return [line for name in names for line in _table(name)]


def _table(name: str) -> list[Line]:
    data = _data()
    table = data["tables"][name]
    place = f"Table {name}" if name.isdigit() else f"section {name}"
    lines = []
    for network, rows in table["networks"].items():
        for row in rows:
            cells = {head: cell for head, cell in zip(table["columns"], row, strict=True) if cell is not None}
            words = {head: str(cells[head]) for head in _WORDS if head in cells}
            if how := data["runnable"].get(cells["row"]):
                words["note"] = "; ".join(filter(None, [words.get("note"), f"here by {how}"]))
            figures = {head: _figure(cell) for head, cell in cells.items() if head not in _WORDS}
            lines.append(
                Line(
                    network="" if network == _ANY else network,
                    kind="cited",
                    figures=figures,
                    protocol=table["protocol"],
                    source=f"{data['paper']}, {place}",
                    reference=data["references"].get(cells["row"], ""),
                    **words,
                )
            )
    return lines


def _figure(cell: float | list[float]) -> Figure:
    return Figure(values=tuple(cell) if isinstance(cell, list) else (cell,))
