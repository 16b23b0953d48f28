"""Plain PyTorch computes from a program what its network computes; a program that does not is not written."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tap_eval import quantize
from tap_eval.allocation.choices import uniform
from tap_eval.export import pt2
from tap_eval.export.pt2 import described, exported, write
from tap_eval.mistake import ExportMistake
from tests.tap_eval.export.cases import NETWORKS, Between, Case, asks, case, looks
from tests.tap_eval.quantization.test_sums import Residual


def loaded(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_program_computes_what_the_network_computes(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    given, path = cases[name], tmp_path / "model.pt2"
    allocation = given.mixed(2, 3, 4, 8, activations=6)
    network = given.at(allocation)

    write(path, network, allocation, given.pixels, {})

    got, wanted = loaded(path)(given.pixels), network.logits(given.pixels, 8)
    assert (got - wanted).square().mean() < 0.01 * wanted.var(), "but for single roundings"


def test_sums_in_integers_are_the_programs_too(tmp_path: Path) -> None:
    images, unseen = torch.rand(16, 3, 16, 16), torch.rand(16, 3, 16, 16)
    quantized = quantize(Residual().eval(), images, "4bit", "uniform", sums="int8", finished=False)
    quantized.save(tmp_path / "model.pt2", strict=True)
    program = torch.export.load(tmp_path / "model.pt2")
    count = Counter(str(node.target) for node in program.graph.nodes)
    assert count["quantized_decomposed.quantize_per_tensor.default"] == 11, "seven values, zeros, three inputs"
    got, wanted = program.module()(unseen), quantized(unseen)
    assert (got - wanted).square().mean() < 0.01 * wanted.var()


WITHOUT_TAP = """
import sys
import torch
import torch.ao.quantization.fx._decomposed
program = torch.export.load(sys.argv[1])
print(program.module()(torch.zeros(3, 3, 16, 16)).shape)
print(any(name.startswith("tap") for name in sys.modules))
"""


def test_it_needs_no_tap_and_holds_integers_by_the_names_of_the_network(cases: dict[str, Case], tmp_path: Path) -> None:
    given, path = cases["straight"], tmp_path / "model.pt2"
    allocation = given.mixed(2, 3, 4, 8)
    network = given.at(allocation)
    write(path, network, allocation, given.pixels, {})
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_TAP, str(path)], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert said == "torch.Size([3, 5])\nFalse\n"
    held = torch.export.load(path).state_dict
    for layer, own in zip(given.prepared.layers, network.layers, strict=True):
        assert own.weight is not None
        assert torch.equal(held[f"{layer.name}.weight_int8"], own.weight.integers)
        assert torch.equal(held[f"{layer.name}.weight_scale"], own.weight.scale)
        assert torch.equal(held[f"{layer.name}.corrected_bias"], own.weight.bias)


@pytest.mark.parametrize("name", ["odd", "perceptron"])
def test_it_takes_any_number_of_images(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    given = cases[name]
    allocation = uniform(given.prepared.layers, 4)
    write(tmp_path / "model.pt2", given.at(allocation), allocation, given.pixels, {})
    program = loaded(tmp_path / "model.pt2")

    one_by_one = torch.cat([program(image) for image in given.pixels[:7].split(1)])

    assert torch.allclose(program(given.pixels[:7]), one_by_one, atol=1e-4 * float(one_by_one.abs().max()))


WRITING = """
import sys
from pathlib import Path
import torch
from tap_eval.allocation.choices import uniform
from tap_eval.export.pt2 import write
from tests.tap_eval.export.cases import Straight, case
torch.manual_seed(0)
given = case(Straight())
bits = uniform(given.prepared.layers, 3)
write(Path(sys.argv[1]), given.at(bits), bits, given.pixels, {"b": 1, "a": {"d": 2, "c": 3}})
"""


def test_a_file_has_the_same_bytes_each_time_and_nothing_of_the_machine(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        subprocess.run([sys.executable, "-c", WRITING, str(tmp_path / name / f"{name}.pt2")], check=True)
    content = (tmp_path / "one" / "one.pt2").read_bytes()
    assert content == (tmp_path / "other" / "other.pt2").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        text = b" ".join(file.read(name) for name in file.namelist())
        assert not [name for name in file.namelist() if "sample_inputs" in name and file.getinfo(name).file_size > 9999]
    assert str(Path(pt2.__file__).parents[2]).encode() not in text
    assert b".py" not in text


def test_few_bits_take_less_of_a_file_than_many(cases: dict[str, Case], tmp_path: Path) -> None:
    given, sizes = cases["resnet20"], []
    for bits in (2, 3, 4, 8):
        allocation = uniform(given.prepared.layers, bits)
        write(tmp_path / "model.pt2", given.at(allocation), allocation, given.pixels, {})
        told = described(tmp_path / "model.pt2")
        sizes.append(sum(layer.size or 0 for layer in told.layers))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[3] / 2


def test_what_is_in_a_file_can_be_read_without_running_it(cases: dict[str, Case], tmp_path: Path) -> None:
    given, path = cases["vit"], tmp_path / "model.pt2"
    allocation = given.mixed(2, 4, activations=5)
    network = given.at(allocation)
    write(path, network, allocation, given.pixels, {"dataset": "none", "test": {"correct": 3}})

    found = described(path)

    assert found.size is not None
    assert found.overhead is not None
    assert found.size + found.overhead == path.stat().st_size
    assert found.about == {"dataset": "none", "test": '{"correct": 3}'}
    assert found.in_float.keys() == given.prepared.in_float().keys()
    for layer, own, bits, described_layer in zip(
        given.prepared.layers, network.layers, allocation.weights, found.layers, strict=True
    ):
        assert own.weight is not None
        assert own.affine is not None
        assert isinstance(bits, tuple)
        assert described_layer.name == layer.name
        assert described_layer.bits == Counter(bits)
        assert described_layer.scales == (float(own.weight.scale.min()), float(own.weight.scale.max()))
        assert described_layer.inputs == own.affine.range
        assert described_layer.activation_bits == 5


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("deep.weight_int8", "the input of group"),
        ("group.corrected_bias", "the input of wide"),
        ("wide.weight_scale", "the input of last"),
        ("head.corrected_bias", "the logits"),
    ],
)
def test_a_program_that_is_not_right_is_not_written_and_the_place_is_named(
    cases: dict[str, Case], name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = cases["straight"]
    allocation = uniform(given.prepared.layers, 4)
    network = given.at(allocation)
    program, names = exported(network, given.pixels)
    program.state_dict[name].view(-1)[1] += 1
    monkeypatch.setattr(pt2, "exported", lambda *_: (program, names))
    with pytest.raises(ExportMistake, match=f"computes something else .* first in {place}"):
        write(tmp_path / "model.pt2", network, allocation, given.pixels, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("step", "said"), [(asks, "how many images"), (looks, "depend on the images")])
def test_what_cannot_be_exported_is_a_mistake_and_no_file(
    step: Callable[[Tensor], Tensor], said: str, tmp_path: Path
) -> None:
    given = case(Between(step))
    allocation = uniform(given.prepared.layers, 4)
    with pytest.raises(ExportMistake, match=said):
        write(tmp_path / "model.pt2", given.at(allocation), allocation, given.pixels, {})
    assert not list(tmp_path.iterdir())


def _other_program(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b"nothing of the kind"), "is no program of torch.export that TAP wrote"),
        (lambda path: None, "cannot be read"),
        (_other_program, "does not hold a network that TAP quantized"),
    ],
)
def test_a_file_that_is_none_is_told(make: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    make(tmp_path / "model.pt2")
    with pytest.raises(ExportMistake, match=said) as refused:
        described(tmp_path / "model.pt2")
    assert len(str(refused.value).splitlines()) == 1
