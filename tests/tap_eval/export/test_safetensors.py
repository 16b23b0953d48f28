"""A packed file holds the network that was measured in as many bytes as its size says; no other is taken for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.allocation.choices import uniform
from tap_eval.allocation.size import FLOAT, packed_size
from tap_eval.export.safetensors import described, read, write
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import ExportMistake
from tap_eval.networks.resnet import CifarResNet
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.quantizer import Allocation, LayerBits, QuantizedNetwork
from tap_eval.quantization.sums import ranged
from tests.tap_eval.preparing.networks import IMAGES, TOKENS, Net, checked, randomized
from tests.tap_eval.quantization.test_sums import Inception, Residual, Shuffled, recorder


class Branchy(nn.Module):
    """Grouped and depthwise convolutions, norms, a head; a gain, a norm and complex numbers that stay in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, groups=8, dilation=2), nn.Conv2d(8, 12, (1, 3), groups=2)
        self.gain, self.layer_norm = nn.Parameter(torch.rand(12, 1, 1) + 0.5), nn.LayerNorm(12)
        self.turn = nn.Parameter(torch.polar(torch.ones(12), torch.rand(12)))
        self.head = nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.relu(self.norm(self.stem(x))))
        x = self.layer_norm((self.grouped(x) * self.gain).mean((2, 3)))
        return self.head((x * self.turn).real)


def quantized(prepared: Prepared, allocation: Allocation, size: int = 16) -> QuantizedNetwork:
    pixels = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    network = QuantizedNetwork(prepared, calibrate(prepared, pixels))
    network.choose(allocation)
    return network


def mixed(prepared: Prepared, *choices: int) -> Allocation:
    """Every other layer has channels of different bits."""
    generator = np.random.default_rng(0)
    weights: list[LayerBits] = [
        tuple(generator.choice(choices, layer.out_channels).tolist()) if layer.index % 2 else choices[0]
        for layer in prepared.layers
    ]
    return Allocation(tuple(weights), tuple(generator.choice([4, 8], len(weights)).tolist()))


def branchy() -> Prepared:
    torch.manual_seed(0)
    return prepare(randomized(Branchy()), torch.rand(2, 3, 16, 16))


def same_logits(path: Path, network: QuantizedNetwork, size: int = 16) -> bool:
    pixels = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(1))
    return torch.equal(read(path, network.prepared).logits(pixels, 5), network.logits(pixels, 5))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda body=body: Net(body(), 8)) for name, (body, _) in IMAGES.items()},
    **{name: (lambda body=body: Net(body(), 8, tokens=True)) for name, (body, _) in TOKENS.items()},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_from_its_file_with_the_same_logits(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = checked(NETWORKS[name]())
    for allocation in (uniform(prepared.layers, 3), mixed(prepared, 2, 3, 8)):
        network = quantized(prepared, allocation)
        write(tmp_path / "model.safetensors", network, allocation, {})
        assert same_logits(tmp_path / "model.safetensors", network)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_file_is_the_packed_size_and_a_header_and_any_reader_finds_the_integers(bits: int, tmp_path: Path) -> None:
    prepared, path = branchy(), tmp_path / "model.safetensors"
    allocation = mixed(prepared, bits, 2, 5)
    network = quantized(prepared, allocation)
    write(path, network, allocation, {"accuracy": 0.5, "of": "nothing"})
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == packed_size(prepared.layers, allocation, FLOAT * prepared.left).total
    tensors = load_file(path)
    for layer, own, of_layer in zip(prepared.layers, network.layers, allocation.weights, strict=True):
        weight = own.weight
        assert weight is not None
        assert own.affine is not None
        rows: dict[int, list[np.ndarray]] = {}
        for channel in range(layer.out_channels):
            each = of_layer if isinstance(of_layer, int) else of_layer[channel]
            rows.setdefault(each, []).append(weight.integers[channel].flatten().numpy())
        for each, expected in rows.items():
            for stored, integers in zip(tensors[f"{layer.name}.weight_packed_{each}"], expected, strict=True):
                number = int.from_bytes(stored.tobytes(), "little")
                found = [(number >> (each * place) & (2**each - 1)) - 2 ** (each - 1) for place in range(len(integers))]
                assert found == integers.tolist()
                assert number >> (each * len(integers)) == 0
        told = tensors.get(f"{layer.name}.weight_bits")
        assert (None if told is None else tuple(told)) == (of_layer if len(rows) > 1 else None)
        assert np.array_equal(tensors[f"{layer.name}.weight_scale"], weight.scale.numpy())
        assert np.array_equal(tensors[f"{layer.name}.corrected_bias"], weight.bias.numpy())
        assert tensors[f"{layer.name}.input_scale"] == np.float32(own.affine.scale)
        assert tensors[f"{layer.name}.input_zero_point"] == own.affine.zero_point
    assert np.array_equal(tensors["gain"], prepared.network.gain.numpy())
    assert tensors["turn"].shape == (12, 2)


def test_the_structure_is_told_by_the_names_of_the_users_network(tmp_path: Path) -> None:
    prepared, path = branchy(), tmp_path / "model.safetensors"
    allocation = uniform(prepared.layers, 4)
    write(path, quantized(prepared, allocation), allocation, {"accuracy": 0.5})
    with safe_open(path, "np") as file:
        told = json.loads(file.metadata()["tap"])
    assert told["about"] == {"accuracy": 0.5}
    assert set(told["in_float"]) == {"gain", "turn", "layer_norm.weight", "layer_norm.bias"}
    stem, depthwise, grouped, head = told["layers"]
    assert (stem["name"], stem["module"], stem["shape"], stem["folded"]) == ("stem", "Conv2d", [8, 3, 3, 3], "norm")
    assert (stem["stride"], stem["padding"]) == ([2, 2], [1, 1])
    assert (depthwise["kind"], depthwise["groups"], depthwise["dilation"]) == ("depthwise", 8, [2, 2])
    assert (grouped["shape"], grouped["groups"], grouped["folded"]) == ([12, 4, 1, 3], 2, None)
    assert (head["module"], head["shape"], head["bits"]) == ("Linear", [4, 12], [4])


def test_a_description_adds_up_to_the_file(tmp_path: Path) -> None:
    prepared, path = branchy(), tmp_path / "model.safetensors"
    allocation = mixed(prepared, 2, 4)
    network = quantized(prepared, allocation)
    write(path, network, allocation, {"accuracy": 0.5, "of": "nothing"})
    told = described(path)
    assert told.size is not None
    assert told.overhead is not None
    assert told.size + told.overhead == path.stat().st_size
    assert told.size == packed_size(prepared.layers, allocation, FLOAT * prepared.left).total
    assert told.about == {"accuracy": "0.5", "of": "nothing"}
    for layer, own, bits in zip(told.layers, network.layers, allocation.weights, strict=True):
        assert own.weight is not None
        assert own.affine is not None
        assert sum(layer.bits.values()) == len(own.weight.scale)
        assert set(layer.bits) == ({bits} if isinstance(bits, int) else set(bits))
        assert layer.scales == (float(own.weight.scale.min()), float(own.weight.scale.max()))
        assert layer.inputs == pytest.approx(
            [own.affine.scale * (end - own.affine.zero_point) for end in (0, 2**own.affine.bits - 1)]
        )


def test_a_file_of_a_finished_network_classifies_as_it_was_measured(bench: Bench, tmp_path: Path) -> None:
    allocation = Allocation((4,) * 9 + ((2, 4) * 5,), (8,) * 10)
    write(tmp_path / "model.safetensors", bench.quantized(allocation), allocation, {})
    network, test = read(tmp_path / "model.safetensors", bench.prepared), bench.splits.test
    correct = int((network.logits(test.pixels, 100).argmax(1) == test.labels).sum())
    assert correct == bench.measure(allocation, "test", finished=True).correct
    with pytest.raises(ExportMistake, match="holds the network at its own bits alone, and not at 8"):
        network.choose(uniform(bench.layers, 8))


WRITING = """
import torch, sys
from pathlib import Path
from tap_eval.allocation.choices import uniform
from tap_eval.export.safetensors import write
from tests.tap_eval.export.test_safetensors import branchy, quantized
prepared = branchy()
bits = uniform(prepared.layers, 3)
write(Path(sys.argv[1]), quantized(prepared, bits), bits, {"b": 1, "a": {"d": 2, "c": 3}})
"""


def test_a_file_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one", "other"):
        subprocess.run([sys.executable, "-c", WRITING, str(tmp_path / name)], check=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.conv.weight_scale = nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) * self.conv.weight_scale).mean((2, 3))

    prepared = prepare(Twice().eval(), torch.rand(2, 3, 8, 8))
    allocation = uniform(prepared.layers, 4)
    with pytest.raises(ExportMistake, match=r"two tensors of the network are called conv\.weight_scale in the file"):
        write(tmp_path / "x", quantized(prepared, allocation, 8), allocation, {})


def test_a_bias_of_each_call_stays_beside_the_one_that_makes_up_for_rounding(tmp_path: Path) -> None:
    class Shared(nn.Module):
        """One weight, called with two biases."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.second.weight = self.first.weight
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)[:, :8]
            return self.head(self.second(F.relu(self.first(x))))

    torch.manual_seed(0)
    prepared = prepare(Shared().eval(), torch.rand(2, 3, 8, 8))
    allocation, path = uniform(prepared.layers, 4), tmp_path / "model.safetensors"
    network = quantized(prepared, allocation, 8)
    write(path, network, allocation, {})
    tensors = load_file(path)
    assert {"first.bias", "second.bias", "first.corrected_bias"} <= tensors.keys()
    assert np.array_equal(tensors["second.bias"], prepared.network.second.bias.numpy())
    assert same_logits(path, network, 8)


def test_a_tensor_of_the_rest_in_float64_is_written_as_the_float32_that_it_counts_as(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gain = nn.Conv2d(3, 4, 3), nn.Parameter(torch.full((4, 1, 1), 0.1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) * self.gain).mean((2, 3)).float()

    prepared = prepare(Wide().eval(), torch.rand(2, 3, 8, 8))
    allocation, path = uniform(prepared.layers, 4), tmp_path / "model.safetensors"
    network = quantized(prepared, allocation, 8)
    write(path, network, allocation, {})
    assert load_file(path)["gain"].dtype == np.float32
    assert prepared.notes == ("some of its tensors are float64, and become float32",)
    assert same_logits(path, network, 8)


def test_a_network_that_does_not_have_the_bits_is_not_written(tmp_path: Path) -> None:
    prepared = branchy()
    network = quantized(prepared, uniform(prepared.layers, 8))
    with pytest.raises(ValueError, match="stem does not have the bits of the allocation"):
        write(tmp_path / "x", network, uniform(prepared.layers, 2), {})


SUMMED: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "resnet20": lambda: CifarResNet(20),
    "inception": Inception,
    "shuffled": Shuffled,
}


def summed(network: nn.Module, activations: int = 8) -> tuple[QuantizedNetwork, Allocation]:
    """A network at 4 bits whose sums are in integers."""
    torch.manual_seed(0)
    found, _ = recorder(randomized(network), torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    allocation = uniform(found.prepared.layers, 4, activations)
    found.choose(allocation)
    return found, allocation


@pytest.mark.parametrize("activations", [8, 5])
@pytest.mark.parametrize("name", SUMMED)
def test_sums_in_integers_come_back_and_take_their_bytes(name: str, activations: int, tmp_path: Path) -> None:
    (network, allocation), path = summed(SUMMED[name](), activations), tmp_path / "model.safetensors"
    write(path, network, allocation, {})
    assert same_logits(path, network)
    assert network.sums
    between = ranged(network.sums.recorded(4), network.prepared)
    size = packed_size(network.prepared.layers, allocation, FLOAT * network.prepared.left, between)
    tensors = load_file(path)
    assert sum(tensor.nbytes for tensor in tensors.values()) == size.total == described(path).size
    scales = [name for name in tensors if name.endswith(".scale") or name.endswith(".input_scale")]
    assert size.inputs == 5 * len(scales)
    assert (len(scales) > len(network.layers) + between.own) == (activations < 8 and len(between.inputs) > 0)
    in_floats = QuantizedNetwork(network.prepared, [layer.seen for layer in network.layers])
    in_floats.choose(allocation)
    assert not same_logits(path, in_floats)


def test_sums_are_told_in_words_that_need_no_tap(tmp_path: Path) -> None:
    network, allocation = summed(Residual())
    write(tmp_path / "model.safetensors", network, allocation, {})
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        told = json.loads(file.metadata()["tap"])["between"]
        names = set(file.keys())
    assert [(each["name"], each["of"], each["then"], each["input_of"]) for each in told] == [
        ("stem.output", [], ["relu", "max_pool2d"], "first"),
        ("second.output", [], [], None),
        ("second.add", ["second.output", "stem.output"], ["relu"], "down"),
        ("down.output", [], ["clamp(0, 6)"], "again"),
        ("again.output", [], [], None),
        ("again.add", ["again.output", "second.add"], ["clamp(0, 6)"], None),
        ("again.add:1", ["again.add", "down.output"], [], None),
    ]
    assert {each["name"] for each in told if f"{each['name']}.scale" in names} == {
        each["name"] for each in told if each["input_of"] is None
    }


SPOILT: list[tuple[Callable[[dict[str, Any], dict[str, Tensor]], object], str]] = [
    (lambda told, tensors: tensors.pop("again.add.scale"), "it has no again.add.scale"),
    (lambda told, tensors: tensors["again.add.scale"].fill_(-1), "is damaged"),
    (lambda told, tensors: told["between"][0].update(input_of="nobody"), "values between layers are others"),
    (lambda told, tensors: told["between"][0].update(range=[0, 1e9]), "it has no stem.output.scale"),
    (lambda told, tensors: told["between"].pop(0), "values between layers are others"),
    (lambda told, tensors: told["between"].pop(), "values between layers are others"),
    (lambda told, tensors: told["between"][0].update(then=[]), "values between layers are others"),
]


@pytest.mark.parametrize(("spoil", "sentence"), SPOILT, ids=range(len(SPOILT)))
def test_other_values_between_layers_are_found_out(
    spoil: Callable[[dict[str, Any], dict[str, Tensor]], object], sentence: str, tmp_path: Path
) -> None:
    (network, allocation), path = summed(Residual()), tmp_path / "model.safetensors"
    write(path, network, allocation, {})
    changed(path, spoil)
    with pytest.raises(ExportMistake, match=sentence):
        read(path, network.prepared)


@pytest.mark.parametrize("place", ["stem.output.scale", "first.input_scale"])
def test_a_range_that_two_scales_do_not_follow_from_is_found_out(place: str, tmp_path: Path) -> None:
    (network, allocation), path = summed(Residual(), 5), tmp_path / "model.safetensors"
    write(path, network, allocation, {})
    changed(path, lambda told, tensors: tensors[place].mul_(1.01))
    with pytest.raises(ExportMistake, match=r"stem\.output has another range than the input of first"):
        read(path, network.prepared)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    prepared = branchy()
    allocation = mixed(prepared, 2, 4)
    write(tmp_path / "model.safetensors", quantized(prepared, allocation), allocation, {})
    return tmp_path / "model.safetensors"


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Changes what the file says of its structure, and its tensors."""
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["tap"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
    change(told, tensors)
    save_file(tensors, path, {"tap": json.dumps(told)})


BAD: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.unlink(), "cannot be read"),
    (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    (lambda path: path.write_bytes(b""), "is not safetensors, or cut off"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not safetensors, or cut off"),
    (lambda path: save_file({"weight": torch.ones(3)}, path), "does not hold a network that TAP quantized"),
    (lambda path: save_file({}, path, {"tap": "[]"}), "is damaged"),
    (lambda path: save_file({}, path, {"tap": "{"}), "is damaged"),
    (lambda path: changed(path, lambda told, tensors: told.update(format=2)), "is of format 2, and this version"),
    (lambda path: changed(path, lambda told, tensors: told.pop("layers")), "is damaged"),
    (lambda path: changed(path, lambda told, tensors: tensors.pop("gain")), "it has no gain"),
    (lambda path: changed(path, lambda told, tensors: tensors.pop("head.weight_bits")), "it has no head.weight_bits"),
    (lambda path: changed(path, lambda told, tensors: tensors["head.weight_bits"].fill_(2)), "channels of other bits"),
    (lambda path: changed(path, lambda told, tensors: told["layers"][0].update(shape=[2**40, 3, 3, 3])), "is damaged"),
    (lambda path: changed(path, lambda told, tensors: told["layers"][0].update(shape=[8, 3, 3, 4])), "is damaged"),
    (lambda path: changed(path, lambda told, tensors: told["layers"][0].update(bits=[])), "is damaged"),
    (lambda path: changed(path, lambda told, tensors: tensors["stem.input_scale"].fill_(torch.nan)), "is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "sentence"), BAD, ids=range(len(BAD)))
def test_what_is_no_such_file_is_one_sentence(written: Path, spoil: Callable[[Path], object], sentence: str) -> None:
    spoil(written)
    with pytest.raises(ExportMistake) as refused:
        described(written)
    assert sentence in str(refused.value)
    assert str(written) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(ExportMistake):
        read(written, branchy())


def test_a_file_is_not_read_into_another_network(written: Path) -> None:
    torch.manual_seed(0)
    other = Branchy()
    other.head = nn.Linear(12, 5)
    with pytest.raises(
        ExportMistake, match=r"is of another network: it has head \(4, 12\) in the place of head \(5, 12"
    ):
        read(written, prepare(randomized(other), torch.rand(2, 3, 16, 16)))
    prepared = branchy()
    with torch.no_grad():
        prepared.network.gain[0] += 1
    with pytest.raises(ExportMistake, match="gain, which stays in float, is another"):
        read(written, prepared)
