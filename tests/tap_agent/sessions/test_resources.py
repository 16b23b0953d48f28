"""What a run opens: its networks with the images that they want."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.models import squeezenet1_1

from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import NetworkSettings, Settings
from tap_eval.images.images import Transform
from tap_eval.mistake import BudgetMistake
from tests.tap_eval.images.pictures import png, write_folder


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


GREY = """
from torch import nn

def network():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""


def test_a_network_of_one_channel_gets_grey_images_of_classes_in_the_order_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grey_network.py").write_text(GREY)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "names.txt").write_text("3\n1\n2\n")
    monkeypatch.chdir(tmp_path)
    network = NetworkSettings(
        network="grey_network:network",
        images=write_folder(tmp_path / "images", {f"{row % 3 + 1}/{row}.png": png(row) for row in range(60)}),
        classes=Path("names.txt"),
    )
    assert network.classes == tmp_path / "names.txt"
    with Resources(Settings(networks=(network,), calibration_draws=1), tmp_path / "cache") as resources:
        (bench,) = resources.benches
    assert bench.splits.search.pixels.shape[1:] == (1, 32, 32)
    assert bench.splits.classes == ("3", "1", "2")
    assert any("class 0 is 3, 1 is 1, 2 is 2" in note for note in bench.notes)
    assert any("made grey" in note for note in bench.notes)


def opened(tmp_path: Path, **settings: Any) -> list[tuple[str, str]]:
    with Resources(Settings(calibration_draws=1, **settings), tmp_path) as resources:
        assert resources.benchmark[0] is resources.benches[0]
        assert len({id(bench.prepared) for bench in resources.benchmark}) == 1
        return [(bench.name, bench.task.budget.text) for bench in resources.benchmark]


def test_candidates_are_measured_at_a_second_budget_unless_several_are_given_or_none_is_wanted(tmp_path: Path) -> None:
    assert opened(tmp_path, budget="3bit") == [("digits", "3bit"), ("digits at 3.6bit", "3.6bit")]
    assert opened(tmp_path, budget="7bit") == [("digits", "7bit"), ("digits at 5.833bit", "5.833bit")]
    assert opened(tmp_path, budget="8bit", bits=(8,)) == [("digits", "8bit")]
    assert opened(tmp_path, budget="4bit, 3bit,4bit") == [("digits", "4bit"), ("digits at 3bit", "3bit")]
    assert opened(tmp_path, budget="3bit", second_budget=False) == [("digits", "3bit")]
    with pytest.raises(BudgetMistake, match="digits: a budget of 1bit is below"):
        opened(tmp_path, budget="3bit,1bit")
