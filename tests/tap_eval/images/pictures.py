"""Tiny images, and sources of them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(value: int, size: tuple[int, int] = (32, 32)) -> bytes:
    return saved(Image.new("RGB", size, (value, 255 - value, 7)))


def write_parquet(
    path: Path,
    images: list[bytes],
    labels: list[int],
    names: Sequence[str] = ("cat", "dog"),
    info: Mapping[str, Any] | None = None,
) -> str:
    features = {"label": {"names": [*names], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": image, "path": None} for image in images],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": pa.array(labels, pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features, **(info or {})}})})
    pq.write_table(table, path)
    return f"parquet:{path}"


def write_folder(path: Path, images: dict[str, bytes]) -> str:
    for name, content in images.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return f"imagefolder:{path}"
