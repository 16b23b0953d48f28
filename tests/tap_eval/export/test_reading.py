"""What is in a file of ONNX can be told without running it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest

from tap_eval.allocation.size import FLOAT, packed_size
from tap_eval.export.extra import Weights
from tap_eval.export.onnx import described, write
from tap_eval.mistake import ExportMistake
from tests.tap_eval.export.cases import Case


def test_what_is_in_a_file_can_be_read_without_running_it(cases: dict[str, Case], tmp_path: Path) -> None:
    given, path = cases["straight"], tmp_path / "model.onnx"
    allocation = given.mixed(2, 4, 8, activations=6)
    network = given.at(allocation)
    write(path, network, allocation, given.pixels, {"dataset": "none"})

    found = described(path)

    size = packed_size(given.prepared.layers, allocation, FLOAT * given.prepared.left)
    assert found.size == size.total
    assert found.overhead == path.stat().st_size - size.total
    assert found.about == {"dataset": "none"}
    assert [layer.name for layer in found.layers] == [layer.name for layer in given.prepared.layers]
    for layer, quantized, bits in zip(found.layers, network.layers, allocation.weights, strict=True):
        assert quantized.weight is not None
        assert quantized.affine is not None
        assert layer.shape == tuple(quantized.layer.weight.shape)
        assert isinstance(bits, tuple)
        assert layer.bits == Counter(bits)
        assert layer.scales == pytest.approx([float(quantized.weight.scale.min()), float(quantized.weight.scale.max())])
        assert layer.activation_bits == 6
        step, zero = quantized.affine.scale, quantized.affine.zero_point
        assert layer.inputs == pytest.approx((-zero * step, (63 - zero) * step))


@pytest.mark.parametrize(("stored", "types"), [("native", ["int2", "int4", "int8"]), ("int8", ["int8"])])
def test_native_and_plain_files_say_what_they_hold(
    cases: dict[str, Case], stored: Weights, types: list[str], tmp_path: Path
) -> None:
    given, path = cases["straight"], tmp_path / "model.onnx"
    allocation = given.mixed(2, 3, 4, 7)
    network = given.at(allocation)
    write(path, network, allocation, given.pixels, {}, stored)

    for layer, quantized in zip(described(path).layers, network.layers, strict=True):
        assert quantized.weight is not None
        assert layer.stored == " and ".join(types)
        assert layer.scales == pytest.approx([float(quantized.weight.scale.min()), float(quantized.weight.scale.max())])


@pytest.mark.parametrize(("content", "said"), [(b"nothing of the kind", "no ONNX"), (None, "cannot be read")])
def test_a_file_that_is_none_is_told(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ExportMistake, match=said):
        described(tmp_path / "model.onnx")


def test_a_network_of_others_is_told(tmp_path: Path) -> None:
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "graph", [], [])), tmp_path / "model.onnx")
    with pytest.raises(ExportMistake, match="TAP quantized"):
        described(tmp_path / "model.onnx")
