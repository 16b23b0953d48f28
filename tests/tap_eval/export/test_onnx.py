"""ONNX Runtime computes from a file what its network computes; a file that is not right is not written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.allocation.choices import uniform
from tap_eval.export.checking import check, session
from tap_eval.export.extra import Weights
from tap_eval.export.onnx import onnx_model, write
from tap_eval.mistake import ExportMistake
from tap_eval.preparing.program import Program, record
from tap_eval.quantization import integer
from tap_eval.quantization.quantizer import Allocation, raised
from tap_eval.quantization.sums import Sums, ranges
from tests.tap_eval.export.cases import NETWORKS, Between, Case, Straight, asks, case, looks


def logits(model: onnx.ModelProto, pixels: Tensor) -> Tensor:
    return torch.from_numpy(session(model, 1).run(["logits"], {"pixels": pixels.numpy()})[0])


def optimized(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of a model when it loads it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimized.onnx"), 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


@pytest.mark.parametrize(
    ("name", "stored"), [*product(["straight", "odd"], ["native", "int8"]), *((name, "packed") for name in NETWORKS)]
)
def test_the_file_computes_what_the_network_computes(cases: dict[str, Case], name: str, stored: Weights) -> None:
    given = cases[name]
    allocation = given.mixed(2, 3, 4, 8) if stored == "packed" else uniform(given.prepared.layers, 4)
    network = given.at(allocation)

    model = onnx_model(network, allocation, given.pixels, {}, stored)

    check(model, network, given.pixels)
    got, wanted = logits(model, given.pixels), network.logits(given.pixels, 8)
    assert (got - wanted).square().mean() < 0.01 * wanted.var(), "but for single roundings"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_int8_and_convolutions_in_integers_once_the_file_is_loaded(
    cases: dict[str, Case], bits: int, tmp_path: Path
) -> None:
    given = cases["straight"]
    allocation = uniform(given.prepared.layers, bits)
    network = given.at(allocation)

    loaded = optimized(onnx_model(network, allocation, given.pixels, {}), tmp_path)

    count = Counter(node.op_type for node in loaded.graph.node)
    assert count["QLinearConv"] == 4, "all but the last, which leaky ReLU reads"
    assert count["Conv"] + count["FusedConv"] == 1
    assert not count["Unpack"]
    assert not count["BitShift"]
    assert not count["Clip"]
    held = [numpy_helper.to_array(each) for each in loaded.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    for layer in network.layers:
        assert layer.weight is not None
        wanted = layer.weight.integers.numpy() * int(raised(torch.tensor(bits)))
        assert any(np.array_equal(each, wanted) for each in held if each.shape == wanted.shape)


@pytest.mark.parametrize("name", ["odd", "perceptron"])
def test_it_takes_any_number_of_images(cases: dict[str, Case], name: str) -> None:
    given = cases[name]
    allocation = uniform(given.prepared.layers, 4)
    model = onnx_model(given.at(allocation), allocation, given.pixels, {})

    one_by_one = torch.cat([logits(model, image) for image in given.pixels[:7].split(1)])

    assert torch.allclose(logits(model, given.pixels[:7]), one_by_one, atol=1e-4 * float(one_by_one.abs().max()))


@pytest.mark.parametrize("name", ["straight", "perceptron"])
def test_inputs_of_few_bits_end_where_their_integers_end(cases: dict[str, Case], name: str) -> None:
    given = cases[name]
    allocation = uniform(given.prepared.layers, 4, 3)
    network = given.at(allocation)

    model = onnx_model(network, allocation, given.pixels, {})

    check(model, network, 30 * given.pixels)


class Dead(nn.Module):
    """Channels that training has left without weights to speak of, with biases that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), nn.Linear(4, 3)
        scale = torch.tensor([1.0, 1e-9, 1e-9, 1e-6, 0.0, 1e-4]).view(-1, 1, 1, 1)
        self.first.weight.data.mul_(scale)
        self.first.bias.data.copy_(torch.tensor([0.1, 0.7, -0.9, 0.3, 0.5, -0.4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.first(x)))).mean((2, 3)))


def test_channels_without_weights_to_speak_of_stay_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = case(Dead())
    allocation = uniform(given.prepared.layers, 4)
    network = given.at(allocation)

    model = onnx_model(network, allocation, given.pixels, {})

    check(model, network, given.pixels)
    assert "QLinearConv" in {node.op_type for node in optimized(model, tmp_path).graph.node}


def test_a_bias_that_is_no_whole_number_of_units_stays_a_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = case(Straight())
    allocation = uniform(given.prepared.layers, 2)
    network = given.at(allocation)

    model = onnx_model(network, allocation, given.pixels, {}, "native")  # whose integers are not raised

    check(model, network, given.pixels)
    negated = [each.name for each in model.graph.initializer if each.name.endswith("corrected_bias_negated")]
    assert "deep.corrected_bias_negated" in negated


@pytest.mark.parametrize(
    ("step", "said"),
    [(torch.special.bessel_j0, "bessel_j0"), (asks, "how many images"), (looks, "depend on the images")],
    ids=["an operator that ONNX lacks", "asks how many", "looks at numbers"],
)
def test_what_cannot_be_exported_is_a_mistake_and_no_file(
    step: Callable[[Tensor], Tensor], said: str, tmp_path: Path
) -> None:
    given = case(Between(step))
    allocation = uniform(given.prepared.layers, 4)

    with pytest.raises(ExportMistake, match=said):
        write(tmp_path / "model.onnx", given.at(allocation), allocation, given.pixels, {})

    assert not list(tmp_path.iterdir())


def _of_each_image(x: Tensor) -> Tensor:
    places = torch.arange(8.0).view(1, 8, 1, 1).expand(len(x), 8, 1, 1)
    return (x + places).view(len(x) * 2, -1, *x.shape[2:]).unflatten(0, (len(x), 2)).flatten(1, 2) / len(x)


def test_code_may_compute_with_the_number_of_images() -> None:
    given = case(Between(_of_each_image))
    allocation = uniform(given.prepared.layers, 8)
    network = given.at(allocation)

    model = onnx_model(network, allocation, given.pixels, {})

    for count in (1, 5):
        pixels = given.pixels[:count]
        with torch.no_grad():
            wanted = given.prepared(pixels, network.layers)
        assert torch.allclose(logits(model, pixels), wanted, atol=1e-2 * float(wanted.abs().max()))


class Added(nn.Module):
    """What two convolutions give, added, and what a third makes of it added to every second pixel, padded."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.down = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, 2, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x) + self.other(x))
        x = F.relu(self.down(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(x.mean((2, 3)))


def test_sums_in_integers_are_the_files_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = case(Added())
    allocation = uniform(given.prepared.layers, 4)
    network = given.at(allocation)

    def recorded(batch: int) -> Program:
        return record(given.prepared, given.pixels[:1].expand(batch, -1, -1, -1).contiguous())

    network.sums = Sums(ranges(recorded(4), given.prepared.modules, given.pixels), recorded)
    model = onnx_model(network, allocation, given.pixels, {})

    check(model, network, given.pixels)
    count = Counter(node.op_type for node in optimized(model, tmp_path).graph.node)
    assert count["QLinearConv"] == 3
    assert count["QLinearAdd"] == 2
    assert not count["Conv"]
    network.sums = None
    with pytest.raises(ExportMistake):
        check(model, network, given.pixels)


def test_bits_are_in_the_metadata_by_the_names_of_the_network(
    right: tuple[Case, Allocation, onnx.ModelProto],
) -> None:
    given, allocation, model = right
    held = {each.key: each.value for each in model.metadata_props}
    names = [layer.name for layer in given.prepared.layers]

    assert json.loads(held["weight_bits"]) == dict(zip(names, allocation.weights, strict=True))
    assert json.loads(held["activation_bits"]) == dict(zip(names, allocation.activations, strict=True))
    assert {node.name for node in model.graph.node if node.name} == set(names)
    assert not any("/" in each or "\\" in each for node in model.graph.node for each in (node.doc_string, node.name))


@pytest.mark.skipif(not integer.exact(), reason="this build multiplies no integers")
def test_a_file_classifies_as_the_integer_path_does(bench, tmp_path: Path) -> None:
    allocation = uniform(bench.layers, 4)
    images, path = bench.splits.search, tmp_path / "digits.onnx"
    network = bench.quantized(allocation, finished=False)

    write(path, network, allocation, images.pixels[:64], {})

    correct = logits(onnx.load(path), images.pixels).argmax(1) == images.labels
    assert abs(int(correct.sum()) - bench.measure(allocation).correct) <= 1
