"""Files of weights as people have them: taken where they fit exactly, else told what they are."""

from __future__ import annotations

import argparse
import collections
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models

from tap_eval.mistake import WeightsMistake
from tap_eval.networks.checkpoint import read
from tap_eval.networks.load import load_network
from tap_eval.networks.weights import load_weights

State = dict[str, Any]


class Net(nn.Module):
    """A convolution, BatchNorm, a buffer that is no part of the state, and a head."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
        self.fc = nn.Linear(6, classes)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean((2, 3)) * self.scale)


class Config(dict[str, Any]):
    """As yacs and others have it: a mapping with attributes."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        self.frozen = True


class Harm:
    """Runs a command when it is unpickled as pickle would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def net() -> nn.Module:
    return Net()


def trained() -> Net:
    network = Net().eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape).add(0.5))
    return network


def load(content: Any, folder: Path) -> tuple[nn.Module, tuple[str, ...]]:
    path = folder / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, types.FunctionType):
        content(path)
    else:
        torch.save(content, path)
    loaded = load_network(f"{__name__}:net", path, folder)
    return loaded.network, loaded.notes


def refusal(content: Any, folder: Path) -> str:
    with pytest.raises(WeightsMistake) as caught:
        load(content, folder)
    return str(caught.value).replace(str(folder), "")


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def legacy(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=False)


BESIDE = {
    "args": argparse.Namespace(folder=Path("x"), lr=0.1),
    "config": Config(a=1),
    "best": np.float64(0.5),
    "history": np.arange(3),
    "losses": collections.defaultdict(list, {"train": [1.0]}),
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
    "other": types.SimpleNamespace(a=1),
}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"net": prefixed("module.", state), "acc": 90.0},
        lambda state: {"checkpoint": {"model_state_dict": prefixed("model.backbone.", state)}},
        lambda state: [prefixed("module._orig_mod.", state), "notes"],
        lambda state: {key.replace("features.", "features.module."): tensor for key, tensor in state.items()},
        lambda state: {"model": state, **BESIDE},
        lambda state: {key: tensor for key, tensor in state.items() if "num_batches" not in key},
        lambda state: {"model_ema": {"n_averaged": torch.tensor(1), **prefixed("module.", state)}},
        lambda state: state | {"scale": torch.full((1,), 2.0)},
        lambda state: {"model": state, "ema": dict(state)},
        lambda state: legacy({"model": state, "args": argparse.Namespace(lr=0.1)}),
        lambda state: lambda path: safetensors.torch.save_file(state, path),
        lambda state: {key: tensor.double() for key, tensor in state.items()},
    ],
)
def test_weights_are_taken_whatever_is_around_them(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    network = trained()
    loaded, notes = load(wrap(network.state_dict()), tmp_path)
    pixels = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(pixels), network(pixels))
    assert notes == ()


@pytest.mark.parametrize("places", [("state_dict", "state_dict_ema"), ("ema_model", "model")])
def test_averages_are_taken_and_told(places: tuple[str, str], tmp_path: Path) -> None:
    states = {place: trained().state_dict() for place in places}
    averaged = next(place for place in places if "ema" in place)
    loaded, (note,) = load(states, tmp_path)
    assert torch.equal(loaded.state_dict()["fc.weight"], states[averaged]["fc.weight"])
    assert f"'{averaged}', which is taken" in note


def test_half_precision_is_taken_and_told(tmp_path: Path) -> None:
    half = trained().half().state_dict()
    loaded, (note,) = load(half, tmp_path)
    assert torch.equal(loaded.state_dict()["fc.weight"], half["fc.weight"].float())
    assert "float16" in note


SAVE_WHOLE = {"model": Net(), "optimizer": BESIDE["optimizer"]}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda state: state | {"fc.weight": torch.ones(7, 6), "fc.bias": torch.ones(7)}, "fc.weight tells 7 classes"),
        (lambda state: {"fc.weight": state["fc.weight"]}, "features.0.weight is missing, and "),
        (lambda state: state | {"extra": torch.ones(1)}, "extra is not of this network"),
        (lambda state: state | {"fc.bias": torch.ones(1)}, "has shape (1,), not (4,)"),
        (lambda state: state | {"fc.weight": torch.ones(4, 6).to(torch.int8)}, "fc.weight is of torch.int8"),
        (lambda state: state | {"scale": torch.ones(1)}, "scale differs from the network's own"),
        (lambda state: state | {"fc.bias": torch.full((4,), torch.nan)}, "fc.bias in /weights.pt holds 4 of 4"),
        (lambda state: {"student": state, "teacher": prefixed("x.", state | {"fc.bias": torch.ones(4)})}, "'teacher'"),
        (lambda state: prefixed("model.", state) | {"loss.weight": torch.ones(4)}, "begins with model. would"),
        (lambda state: {"state_dict": models.squeezenet1_1().state_dict()}, "of its 52 tensors 2 have names of"),
        (lambda state: Net(), "whole network (tests.tap_eval.networks.test_weights.Net)"),
        (lambda state: SAVE_WHOLE, "a whole network in its 'model' ("),
        (lambda state: BESIDE["optimizer"], "the state of an optimizer"),
        (lambda state: lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), "a TorchScript archive"),
        (lambda state: [1], "holds a list, no state dict"),
        (lambda state: {"epoch": 1}, "a mapping of 'epoch'"),
        (lambda state: state["fc.bias"], "a single tensor"),
        (lambda state: b"", "is empty"),
        (lambda state: b"PK\x03\x04 and no more", "is cut off"),
        (lambda state: b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (lambda state: b"<!DOCTYPE html>", "is a web page"),
        (lambda state: b'{"weight_map": {}}', "is JSON"),
        (lambda state: b"\x40\0\0\0\0\0\0\0{", "cannot be read as safetensors"),
        (lambda state: b"garbage", "cannot be read as a state dict"),
        (lambda state: lambda path: path.mkdir(), "is no file"),
        (lambda state: lambda path: None, "does not exist"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TorchScript is on its way out
def test_what_does_not_fit_is_said(spoil: Callable[[State], Any], sentence: str, tmp_path: Path) -> None:
    assert sentence in refusal(spoil(trained().state_dict()), tmp_path)


def test_an_exported_program_is_named(tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)
    with pytest.raises(WeightsMistake, match=r"an archive of torch\.export"):
        read(path)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: legacy(content)(path)])
def test_no_code_of_a_file_runs(save: Callable[[Any, Path], None], tmp_path: Path) -> None:
    save({"model": trained().state_dict(), "more": Harm(tmp_path / "harmed")}, tmp_path / "weights.pt")
    with pytest.raises(WeightsMistake, match="system"):
        load_network(f"{__name__}:net", tmp_path / "weights.pt", tmp_path)
    assert not (tmp_path / "harmed").exists()


def vit() -> nn.Module:
    return models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)


def densenet() -> nn.Module:
    return models.DenseNet(8, (2,), 16, num_classes=3)


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    return network


@pytest.mark.parametrize(
    ("make", "older"),
    [
        (vit, lambda key: key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")),
        (densenet, lambda key: key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2.")),
        (models.mnasnet0_5, lambda key: key),
        (tied, lambda key: key if key != "1.weight" else None),
    ],
)
def test_older_names_and_tied_weights_are_known(
    make: Callable[[], nn.Module], older: Callable[[str], str | None], tmp_path: Path
) -> None:
    """As torch itself and torchvision read them, without the versions that a state dict carries."""
    network, other = make(), make()
    state = {new: tensor for key, tensor in network.state_dict().items() if (new := older(key))}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    load_weights(other, "a network", read(tmp_path / "weights.safetensors"))
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in network.state_dict().items())
