"""Lines of a table in a Parquet file: a row for each quantity of a line, and one for a line that has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from tap_agent.tables.line import Line, column
from tap_eval.storage import replacing

KEY = b"tap-agent table"
"""of the file's metadata, under which is the plan that it came of"""
_WORDS = ("network", "budget", "variant", "row", "kind", "bits", "sees")
_LAST = ("protocol", "source", "reference", "note")
_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in _WORDS),
        pa.field("quantity", pa.string()),
        pa.field("unit", pa.string()),
        pa.field("mean", pa.float64()),
        pa.field("spread", pa.float64()),
        pa.field("count", pa.int32()),
        pa.field("values", pa.list_(pa.float64())),
        *(pa.field(name, pa.string()) for name in _LAST),
    ]
)


def write(path: Path, lines: Sequence[Line], plan: dict[str, Any]) -> None:
    """Replaces the file at `path` at once; `plan` is kept as JSON in its metadata."""
    table = pa.Table.from_pylist([row for line in lines for row in _rows(line)], _SCHEMA)
    with replacing(path) as fresh:
        parquet.write_table(table.replace_schema_metadata({KEY: json.dumps(plan).encode()}), fresh, compression="zstd")


def _rows(line: Line) -> list[dict[str, Any]]:
    words = {name: getattr(line, name) for name in (*_WORDS, *_LAST)}
    return [
        words
        | {
            "quantity": name,
            "unit": column(name).unit,
            "mean": figure.mean,
            "spread": figure.spread,
            "count": len(figure.values),
            "values": list(figure.values),
        }
        for name, figure in line.figures.items()
    ] or [words]
