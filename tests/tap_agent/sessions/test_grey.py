"""Settings, the network and its images meet."""

from __future__ import annotations

from pathlib import Path

import pytest

from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import NetworkSettings, Settings
from tests.tap_eval.images.pictures import png, write_folder

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
