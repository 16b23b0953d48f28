"""`from tap_eval import quantize`: what a user's own code gets of a network that it has in its hands."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tap_eval import quantize
from tap_eval.allocation.size import weight_size
from tap_eval.export import safetensors
from tap_eval.measuring.accuracy import mean_kl
from tap_eval.mistake import BudgetMistake, ExportMistake, ImagesMistake, ProxyMistake
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization.quantizer import Allocation
from tap_eval.quantization.ranges import RangeRule
from tap_eval.quantization.sums import SumsIn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.second(self.first(x).relu())).relu().mean((2, 3)))


@pytest.fixture
def network() -> nn.Module:
    return Small().eval()


IMAGES = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))
UNSEEN = torch.rand(64, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def earlier_layers_more(layers, task):
    assert task["budget"] == "3bit"
    return [1 / (1 + layer["index"]) for layer in layers]


@pytest.mark.parametrize("rule", ["paper", "uniform", earlier_layers_more])
def test_a_network_is_quantized_within_the_budget_and_near_to_itself(network: nn.Module, rule: object) -> None:
    quantized = quantize(network, IMAGES, "3bit", rule)

    assert weight_size(quantized.layers, quantized.allocation) <= 3 * sum(layer.params for layer in quantized.layers)
    assert [layer.name for layer in quantized.layers] == ["first", "second", "last"]
    for layer, bits in zip(quantized.network.layers, quantized.allocation.weights, strict=True):
        assert int(layer.weight.integers.abs().max()) <= 2 ** (bits - 1) - 1
    with torch.inference_mode():
        expected = network(UNSEEN)
    worst = quantize(network, IMAGES, "2bit", "uniform", finished=False)
    assert mean_kl(expected, quantized(UNSEEN)) < mean_kl(expected, worst(UNSEEN))


def test_a_rule_of_ones_own_decides_which_layers_get_bits(network: nn.Module) -> None:
    def last_alone(layers, task):
        return [1.0 if layer["last"] else 0.001 for layer in layers]

    first, second, last = quantize(network, IMAGES, "3bit", last_alone).allocation.weights
    assert last == 8
    assert first < 8
    assert second < 8


def test_the_network_is_saved_as_a_file_that_gives_it_back(network: nn.Module, tmp_path: Path) -> None:
    quantized = quantize(network, IMAGES, "3bit", "uniform")
    quantized.save(tmp_path / "small.safetensors")
    again = safetensors.read(tmp_path / "small.safetensors", prepare(network, IMAGES[:2]))
    assert torch.equal(again.logits(UNSEEN, 64), quantized.network.logits(UNSEEN, 64))
    with pytest.raises(ExportMistake, match=r"'small.tflite' does not end in .safetensors, .onnx or .pt2"):
        quantized.save(tmp_path / "small.tflite")


class Added(nn.Module):
    """What two convolutions give, added; of so many images or more it looks at values."""

    def __init__(self, branching: int = 1000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
        self.branching = branching

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (self.first(x) + self.second(x)).relu().mean((2, 3))
        return self.last(-x if len(x) >= self.branching and float(x.sum()) > 1e9 else x)


def test_sums_may_be_in_integers_which_counts_and_is_saved(tmp_path: Path) -> None:
    network = Added().eval()
    summed, plain = (quantize(network, IMAGES, "4bit", "uniform", sums=sums) for sums in ("int8", "float"))
    assert summed.size.total == plain.size.total + 3 * 5
    assert not torch.allclose(summed(UNSEEN), plain(UNSEEN), atol=1e-5)
    summed.save(tmp_path / "small.safetensors")
    again = safetensors.read(tmp_path / "small.safetensors", prepare(network, IMAGES[:2]))
    assert torch.equal(again.logits(UNSEEN, 64), summed.network.logits(UNSEEN, 64))
    exact = f"{plain.size.total}B"
    assert quantize(network, IMAGES, exact, "uniform", sums="int8").size.total <= plain.size.total


@pytest.mark.parametrize(("least", "ranges"), [(1, "minmax"), (1, "ema"), (2, "ema")])
def test_sums_of_a_network_that_cannot_be_recorded_stay_in_float32(least: int, ranges: RangeRule) -> None:
    with pytest.warns(UserWarning, match=r"sums between layers stay in float32, since its steps cannot be recorded"):
        found = quantize(Added(least).eval(), IMAGES, "4bit", "uniform", activation_ranges=ranges)
    assert found.network.sums is None


class Upsampled(nn.Module):
    """Interpolates between convolutions, adds what it came from, and divides by a size that it asks for."""

    def __init__(self, mode: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, 5),
        )
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        if self.mode:
            y = nn.functional.interpolate(y, scale_factor=2, mode=self.mode)
        y = (self.second(y) + y).relu()
        return self.last(y.sum((2, 3)) / (y.shape[2] * y.shape[3]))


@pytest.mark.parametrize("sums", ["int8", "float"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_network_that_interpolates_is_written_in_every_format(mode: str, sums: SumsIn, tmp_path: Path) -> None:
    found = quantize(Upsampled(mode).eval(), IMAGES, "4bit", "uniform", sums=sums)
    for name in ("a.safetensors", "a.onnx", "a.pt2"):
        found.save(tmp_path / name)  # which holds it against the network


@pytest.mark.parametrize("ranges", ["minmax", "omse"])
@pytest.mark.parametrize("bits", [3, 6])
def test_what_a_layer_reads_in_fewer_bits_is_rounded_from_bytes_in_files_too(
    bits: int, ranges: RangeRule, tmp_path: Path
) -> None:
    found = quantize(Upsampled(None).eval(), IMAGES, "4bit", "uniform", activation_ranges=ranges)
    allocation = Allocation(found.allocation.weights, (8, bits, 8))
    found.network.choose(allocation)
    for name in ("a.onnx", "a.pt2"):
        replace(found, allocation=allocation).save(tmp_path / name)


def test_autocast_of_the_caller_changes_nothing_and_stays() -> None:
    plain = quantize(Upsampled(None).eval(), IMAGES, "4bit", "uniform")
    with torch.autocast("cpu", torch.bfloat16):
        found = quantize(Upsampled(None).eval(), IMAGES, "4bit", "uniform")
        assert torch.is_autocast_enabled("cpu")
        assert torch.equal(found(UNSEEN), plain(UNSEEN))
    assert found.network.prepared.notes == plain.network.prepared.notes


def test_images_of_another_size_than_steps_were_recorded_for_are_refused_and_none_give_none() -> None:
    found = quantize(Upsampled(None).eval(), IMAGES, "4bit", "uniform")
    assert found(IMAGES[:0]).shape == (0, 5)
    with pytest.raises(ImagesMistake, match=r"images are \(3, 16, 16\), .* for \(3, 12, 12\): give images"):
        found(torch.rand(2, 3, 16, 16))


class Assorted(nn.Module):
    """Holds a tensor in float64, one in half precision, and one whose rows are the same memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)
        self.place = nn.Parameter(torch.rand(4, 12, 12, dtype=torch.float64))
        self.register_buffer("factor", torch.tensor(2.0, dtype=torch.float16))
        self.register_buffer("blur", torch.rand(1, 1, 3, 3).expand(4, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = (self.first(x) + self.place).float() * self.factor
        return self.last(nn.functional.conv2d(y, self.blur, groups=4).mean((2, 3)))


def test_tensors_of_other_floats_count_as_what_they_become(tmp_path: Path) -> None:
    found = quantize(Assorted().eval(), IMAGES, "8bit", "uniform")
    found.save(tmp_path / "a.safetensors")
    held = load_file(tmp_path / "a.safetensors")
    assert sum(each.numel() * each.element_size() for each in held.values()) == found.size.total
    assert any("float64" in note and "become float32" in note for note in found.network.prepared.notes)
    with torch.no_grad():
        assert (found(UNSEEN) - Assorted().eval()(UNSEEN)).abs().max() < 0.05


def test_a_mistake_is_a_sentence(network: nn.Module) -> None:
    with pytest.raises(BudgetMistake, match="1bit"):
        quantize(network, IMAGES, "1bit")
    with pytest.raises(ProxyMistake, match="'peper' is no rule: give a function sensitivity"):
        quantize(network, IMAGES, "4bit", "peper")
    with pytest.raises(ProxyMistake, match=r"the rule fails \(wrong shape\): .*list of 3 entries"):
        quantize(network, IMAGES, "4bit", lambda layers, task: [1.0])
    for images in (IMAGES[:0], IMAGES[0], IMAGES.double(), (IMAGES * 255).byte()):
        with pytest.raises(ImagesMistake, match=r"calibration images are \(.*\) of .*: give some as \(N, C, H, W\)"):
            quantize(network, images, "4bit")


def test_the_library_costs_nothing_until_it_is_used() -> None:
    script = "import sys, tap_eval.mistake; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
