"""Whoever writes a file is told what of it is in float32, and may refuse that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tap_eval import quantize
from tap_eval.export.remaining import Remaining
from tap_eval.library import Quantized
from tap_eval.mistake import ExportMistake
from tap_eval.quantization.sums import SumsIn
from tests.tap_eval.export.cases import Straight
from tests.tap_eval.export.test_safetensors import Branchy
from tests.tap_eval.quantization.test_sums import Residual

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def quantized(network: nn.Module, sums: SumsIn = "float") -> Quantized:
    torch.manual_seed(0)
    return quantize(network.eval(), IMAGES, "4bit", "uniform", sums=sums, finished=False)


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx"])
def test_a_network_that_is_all_in_integers_is_written_without_a_word(name: str, tmp_path: Path) -> None:
    assert quantized(Residual(), "int8").save(tmp_path / name, strict=True).sentences() == []
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx"])
def test_sums_in_float_are_named_and_may_be_refused(name: str, tmp_path: Path) -> None:
    network = quantized(Residual())
    with pytest.raises(ExportMistake, match=rf"{name} would not be all in integers.*3 add, 1 mean") as refused:
        network.save(tmp_path / name, strict=True)
    assert len(str(refused.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())
    left = network.save(tmp_path / name)
    assert (left.between, left.summed) == ({"add": 3, "mean": 1}, 4)
    assert "3 add, 1 mean, of which --sums int8 has 4 in 8 bits" in left.sentences()[-1]


def test_layers_that_the_runtime_multiplies_in_float_are_named(tmp_path: Path) -> None:
    left = quantized(Residual()).save(tmp_path / "model.onnx")
    assert left.layers == ("stem", "second", "down", "again"), "whose outputs are read as floats, and first's is not"
    assert left.sentences()[0].endswith(": stem, second, down, again")
    left = quantized(Straight(), "int8").save(tmp_path / "model.onnx")
    assert left.between == {"leaky_relu": 1, "mean": 1}
    assert left.layers == ()


def test_tensors_that_no_layer_holds_are_named_with_their_bytes_the_largest_first(tmp_path: Path) -> None:
    left = quantized(Branchy()).save(tmp_path / "model.safetensors")
    first, second = left.sentences()
    assert first.startswith("kept in float32: turn (48 bytes, mul), gain (48 bytes, mul), ") or first.startswith(
        "kept in float32: turn (96 bytes, mul), gain (48 bytes, mul), "
    )
    assert second == "computed in float32 between layers: 2 mul, 1 mean, 1 native_layer_norm, 1 view_as_real"


class Asking(nn.Module):
    """Its way depends on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x).mean((2, 3))
        return self.head(-x if float(x.sum()) > 1e9 else x)


def test_what_cannot_be_recorded_is_said_to_be_in_float(tmp_path: Path) -> None:
    network = quantized(Asking())
    (said,) = network.save(tmp_path / "model.safetensors").sentences()
    assert "between layers is all that there is, since the network's steps cannot be recorded" in said
    with pytest.raises(ExportMistake, match="would not be all in integers"):
        network.save(tmp_path / "other.safetensors", strict=True)


def test_of_many_the_first_are_named() -> None:
    said = Remaining({f"norm{place}": (place, "layer_norm") for place in range(9)}, {}).sentences()
    assert said == [
        "kept in float32: norm8 (8 bytes, layer_norm), norm7 (7 bytes, layer_norm), norm6 (6 bytes, layer_norm), "
        "norm5 (5 bytes, layer_norm), norm4 (4 bytes, layer_norm), norm3 (3 bytes, layer_norm) and 3 more"
    ]
