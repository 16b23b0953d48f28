"""Networks that a benchmark trains: the same by their seed, and opened by name as any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import train
from tap_eval.networks.load import load_network
from tests.tap_eval.images.pictures import png, write_parquet


@pytest.mark.parametrize("name", train.NETWORKS)
def test_a_network_is_trained_and_opened_by_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = list(range(0, 128, 4))
    images = write_parquet(tmp_path / "images.parquet", list(map(png, values)), [int(each > 60) for each in values])
    for file in ("one.safetensors", "again.safetensors"):
        out = tmp_path / file
        arguments = ["train.py", name, "--images", images, "--held-out", images, "--out", str(out), "--epochs", "2"]
        arguments += ["--batch", "16", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", arguments)
        train.main()
        assert "of 32 images that were held out" in capsys.readouterr().out
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    network = load_network(f"benchmarks.train:{name}", tmp_path / "one.safetensors", tmp_path).network
    trained = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(tensor, trained[key]) for key, tensor in network.state_dict().items())
    untrained = train.NETWORKS[name]().state_dict()
    assert any(not torch.equal(trained[key], untrained[key]) for key in trained)
