"""What a run opens: its networks with the images that they want."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.models import squeezenet1_1

from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import NetworkSettings, Settings
from tap_eval.images.images import Transform


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Of a thousand classes, a dozen images."""
    buffer = io.BytesIO()
    Image.new("RGB", (90, 80), (200, 30, 7)).save(buffer, "PNG")
    rows = [{"bytes": buffer.getvalue(), "path": None}] * 12
    table = pa.table({"image": rows, "label": pa.array([999] * len(rows), pa.int64())})
    pq.write_table(table, tmp_path / "images.parquet")
    return f"parquet:{tmp_path / 'images.parquet'}"


@pytest.mark.parametrize("transform", [None, Transform(resize=64, crop=64)])
def test_images_are_what_published_weights_want_unless_told(
    transform: Transform | None, images: str, tmp_path: Path
) -> None:
    file = tmp_path / "squeezenet1_1-b8a52dc0.pth"
    torch.save(squeezenet1_1().state_dict(), file)
    network = NetworkSettings(
        network="squeezenet1_1", weights=file, images=images, search=2, test=2, transform=transform
    )
    settings = Settings(networks=(network,), budget="8bit", calibration_images=2, calibration_draws=1)
    with Resources(settings, tmp_path) as resources:
        (bench,) = resources.benches
    assert bench.splits.search.transform == (transform or Transform(resize=256, crop=224))
    assert any("IMAGENET1K_V1" in note for note in bench.notes)
    assert any("crop=224" in note for note in bench.notes) == (transform is None)
