"""The sweep over networks runs, and sees what differs without a word."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import networks
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "torchvision.shufflenet_v2_x0_5", "torchvision.squeezenet1_1", "timm.test_nfnet", "timm.test_vit", "timm.lcnet_035",
)  # fmt: skip


Sweep = Callable[..., tuple[int, str, list[dict[str, object]]]]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """Sweeps over networks, each in a process: the exit code, what is printed, and what was found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def swept(*names: str) -> tuple[int, str, list[dict[str, object]]]:
        monkeypatch.setattr(sys, "argv", ["networks", *names, "--pixels", "64", "--results", "found.jsonl"])
        code = networks.main()
        return code, capsys.readouterr().out, [*map(json.loads, Path("found.jsonl").read_text().splitlines())]

    return swept


def test_five_small_networks_have_no_silent_difference() -> None:
    found = [{"network": name, "pixels": 64} | networks.examined(name, 64) for name in SMALL]
    assert not [row["faults"] for row in found if row["faults"]]
    assert not [row["refused"] for row in found if "refused" in row]
    printed = networks.table(found)
    assert all(f"| {name} | 64 |" in printed for name in SMALL)


def test_what_a_sweep_has_found_is_not_done_again(sweep: Sweep) -> None:
    code, printed, found = sweep(SMALL[1])
    assert code == 0
    assert [row["network"] for row in found] == [SMALL[1]]
    assert f"| {SMALL[1]} | 64 |" in printed
    assert sweep(SMALL[1])[2] == found


def test_a_network_that_crashes_is_a_fault_and_is_tried_again(sweep: Sweep) -> None:
    earlier = {"network": "timm.nothing", "pixels": 64, "faults": ["took more than 1 s"]}
    Path("found.jsonl").write_text(json.dumps(earlier) + "\n")
    code, printed, found = sweep("timm.nothing")
    assert code == 1
    assert "crashed" in printed
    assert len(found) == 2


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Prepared, torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    images = torch.randn(3, 3, 8, 8)
    return network, prepare(network, images), images


@torch.no_grad()
def found_of(network: nn.Module, prepared: Prepared, images: torch.Tensor) -> list[str]:
    row = networks.outputs(network, prepared, [images]) | networks.operations(network, prepared, images)
    row |= networks.parameters(network, prepared)
    return networks.faults(row | {"idle_at_8_bits": [], "unfit": None, "paths_mean": 0.01, "bits_mean": 0.01})


def test_differences_that_nothing_tells_of_are_faults(small: tuple[nn.Module, Prepared, torch.Tensor]) -> None:
    network, prepared, images = small
    assert not found_of(network, prepared, images)

    first, last = prepared.layers
    other = nn.Linear(8 * 36, 5)
    (difference,) = found_of(network, replace(prepared, modules=(prepared.modules[0], other)), images)
    assert "outputs differ" in difference
    (operations,) = found_of(network, replace(prepared, layers=(replace(first, macs=1), last)), images)
    assert "operations" in operations
    (parameters,) = found_of(network, replace(prepared, layers=(first, replace(last, params=1439))), images)
    assert parameters == "1 parameters are nowhere"
    assert "layers do not run: x" in found_of(
        network, replace(prepared, layers=(first, last, replace(last, name="x", index=2))), images
    )


def test_operations_of_activations_are_told_from_those_of_weights() -> None:
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(3, 5, 8)
    with networks.plain_attention(), networks.Operations(attention, x) as counted, torch.no_grad():
        attention(x, x, x)
    assert counted.of_weights == 3 * 5 * 8 * 32
    assert counted.of_activations == 3 * 2 * 5 * 5 * 8
