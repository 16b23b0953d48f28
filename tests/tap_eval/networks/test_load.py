"""Networks by name, and weights that fit or do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tap_eval.mistake import NetworkMistake, WeightsMistake
from tap_eval.networks.load import load_network
from tap_eval.networks.resnet import CifarResNet


def tiny() -> nn.Module:
    return nn.Linear(3, 2)


def not_a_network() -> int:
    return 1


def failing() -> nn.Module:
    raise RuntimeError("no")


def test_weights_are_loaded_whatever_wraps_them(tmp_path: Path) -> None:
    network = CifarResNet(20)
    state = network.state_dict()
    for content in (
        state,
        {"state_dict": state},
        {"model": {f"module.{name}": value for name, value in state.items()}},
    ):
        torch.save(content, tmp_path / "weights.pt")
        loaded = load_network("cifar_resnet20", tmp_path / "weights.pt", tmp_path)
        assert torch.equal(loaded.state_dict()["conv1.weight"], state["conv1.weight"])
        assert not loaded.training


def test_torchvision_and_factories(tmp_path: Path) -> None:
    state = load_network(f"{__name__}:tiny", None, tmp_path).state_dict()
    assert state["weight"].shape == (2, 3)
    from torchvision.models import squeezenet1_1

    torch.save(squeezenet1_1().state_dict(), tmp_path / "squeezenet.pt")
    assert load_network("squeezenet1_1", tmp_path / "squeezenet.pt", tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet81", "perhaps resnet18"),
        ("cifar_resnet21", "20, 32, 44, 56"),
        ("absent.module:f", "ModuleNotFoundError"),
        (f"{__name__}:absent", "AttributeError"),
        (f"{__name__}:failing", "RuntimeError: no"),
        (f"{__name__}:not_a_network", "returned a int"),
    ],
)
def test_an_unknown_network_is_named(name: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(NetworkMistake, match=sentence):
        load_network(name, None, tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def sentence(content: object) -> str:
        path = tmp_path / "weights.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(WeightsMistake) as caught:
            load_network("cifar_resnet20", path, tmp_path)
        return str(caught.value)

    state = CifarResNet(20).state_dict()
    assert "cannot be read as a state dict" in sentence(b"garbage")
    assert "holds a list" in sentence([1])
    assert "conv1.weight is missing" in sentence({name: state[name] for name in state if name != "conv1.weight"})
    assert "extra is not of this network" in sentence(state | {"extra": torch.ones(1)})
    assert "has shape (1,), not (10,)" in sentence(state | {"linear.bias": torch.ones(1)})
    with pytest.raises(WeightsMistake, match="does not exist"):
        load_network("cifar_resnet20", tmp_path / "absent.pt", tmp_path)
    with pytest.raises(WeightsMistake, match="--weights FILE"):
        load_network("cifar_resnet20", None, tmp_path)
