"""Networks by name, and those of torchvision as its published weights want them."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from tap_eval.images.images import Transform
from tap_eval.mistake import NetworkMistake, WeightsMistake
from tap_eval.networks import published
from tap_eval.networks.load import load_network


def tiny() -> nn.Module:
    return nn.Linear(3, 2)


def not_a_network() -> int:
    return 1


def failing() -> nn.Module:
    raise RuntimeError("no")


def by_torchvision(name: str, state: dict[str, torch.Tensor]) -> nn.Module:
    """What torchvision's own builder makes of an entry whose file holds `state`."""
    entry = next(iter(models.get_model_weights(name)))
    stand_in = object.__new__(type(entry))
    stand_in._name_, stand_in._value_ = entry.name, entry.value
    stand_in.get_state_dict = lambda **_: state
    return models.get_model(name, weights=stand_in).eval()


@torch.no_grad()
def same(one: nn.Module, other: nn.Module) -> bool:
    pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    return torch.equal(one(pixels), other(pixels))


def test_factories_and_networks_of_torchvision(tmp_path: Path) -> None:
    loaded = load_network(f"{__name__}:tiny", None, tmp_path)
    assert loaded.network.state_dict()["weight"].shape == (2, 3)
    assert loaded.transform is None
    assert not loaded.network.training
    own = models.squeezenet1_1().eval()
    torch.save(own.state_dict(), tmp_path / "own.pt")
    loaded = load_network("squeezenet1_1", tmp_path / "own.pt", tmp_path)
    assert same(loaded.network, own)
    assert (loaded.transform, loaded.notes) == (None, ())


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


@pytest.mark.parametrize(
    ("name", "file", "entry", "resize"),
    [("googlenet", "googlenet-1378be20.pth", None, 256), ("inception_v3", "own.pt", "IMAGENET1K_V1", 342)],
)
def test_a_published_file_is_used_as_torchvision_does(
    name: str, file: str, entry: str | None, resize: int, tmp_path: Path
) -> None:
    state = models.get_model(name, weights=None, aux_logits=True, init_weights=False).state_dict()
    torch.save(state, tmp_path / file)
    loaded = load_network(name, tmp_path / file, tmp_path, entry)
    assert same(loaded.network, by_torchvision(name, state))
    assert loaded.transform
    assert loaded.transform.resize == resize


def test_a_network_without_auxiliary_heads_may_normalize_its_input(tmp_path: Path) -> None:
    state = models.googlenet(weights=None, aux_logits=True, init_weights=False).state_dict()
    expected = by_torchvision("googlenet", state)
    torch.save(expected.state_dict(), tmp_path / "own.pt")
    loaded = load_network("googlenet", tmp_path / "own.pt", tmp_path, "IMAGENET1K_V1")
    assert same(loaded.network, expected)
    silent = load_network("googlenet", tmp_path / "own.pt", tmp_path)
    assert not same(silent.network, expected)
    assert "--weights-entry" in silent.notes[0]


def test_the_transform_is_that_of_the_weights(tmp_path: Path) -> None:
    torch.save(models.regnet_y_400mf().state_dict(), tmp_path / "regnet_y_400mf-e6988f5f.pth")
    loaded = load_network("regnet_y_400mf", tmp_path / "regnet_y_400mf-e6988f5f.pth", tmp_path)
    assert loaded.transform == Transform(resize=232, crop=224)
    assert "IMAGENET1K_V2" in loaded.notes[0]
    assert published.transform(models.Swin_V2_T_Weights.DEFAULT) == Transform(
        resize=260, crop=256, interpolation="bicubic"
    )


def test_sizes_of_images_are_those_of_the_weights() -> None:
    entry = models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1
    assert published.arguments("vit_b_16", entry, auxiliary=False) == {"num_classes": 1000, "image_size": 384}


def test_a_published_file_is_recognised_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    path.write_bytes(b"weights")
    names = [hashlib.sha256(content).hexdigest()[:8] for content in (b"others", b"weights")]
    known = [SimpleNamespace(url=f"https://example.org/network-{name}.pth") for name in names]
    assert published.recognised(path, known) is known[1]
    assert published.recognised(path, known[:1]) is None


def test_published_weights_are_fetched_by_their_hash_and_never_unpickled_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    own, bomb = models.squeezenet1_1().eval(), {"classifier.1.bias": Bomb()}
    real = models.SqueezeNet1_1_Weights.DEFAULT
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for state, wrong in ((own.state_dict(), False), (own.state_dict(), True), (bomb, False)):
        torch.save(state, tmp_path / "made.pth")
        start = hashlib.sha256((tmp_path / "made.pth").read_bytes()).hexdigest()[:8]
        file = tmp_path / f"squeezenet1_1-{'00000000' if wrong else start}.pth"
        shutil.copy(tmp_path / "made.pth", file)
        entry = SimpleNamespace(name="DEFAULT", url=file.as_uri(), transforms=real.transforms, meta=real.meta)
        monkeypatch.setattr(published, "named", lambda *_, entry=entry: entry)
        monkeypatch.setattr(published, "entries", lambda *_, entry=entry: [entry])
        if wrong or state is bomb:
            with pytest.raises(WeightsMistake, match="invalid hash value" if wrong else "squeezenet1_1"):
                load_network("squeezenet1_1", None, tmp_path)
            assert not wrong or len(list((tmp_path / "hub" / "checkpoints").iterdir())) == 1
        else:
            loaded = load_network("squeezenet1_1", None, tmp_path)
            assert same(loaded.network, own)
            assert loaded.transform
            file.unlink()
            assert same(load_network("squeezenet1_1", None, tmp_path).network, own)  # what was fetched is there
            (tmp_path / "hub" / "checkpoints" / file.name).rename(tmp_path / "held")
            with pytest.raises(WeightsMistake) as raised:
                load_network("squeezenet1_1", None, tmp_path)
            there = (tmp_path / "held").rename(tmp_path / "hub" / "checkpoints" / file.name)
            assert f"put {entry.url} at {there}, or give a state dict with --weights FILE." in str(raised.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "file", "entry", "sentence"),
    [
        ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth", "IMAGENET1K_V7", "there are IMAGENET1K_V1"),
        ("regnet_y_400mf", "regnet_y_400mf-e6988f5f.pth", "IMAGENET1K_V1", "is torchvision's IMAGENET1K_V2"),
        ("cifar_resnet20", "resnet.pt", "IMAGENET1K_V1", "none of its networks"),
        ("cifar_resnet20", None, None, "--weights FILE"),
        ("digits", "digits.pt", None, "is trained here"),
    ],
)
def test_weights_that_a_network_cannot_have_are_named(
    name: str, file: str | None, entry: Any, sentence: str, tmp_path: Path
) -> None:
    if file:
        torch.save({"weight": torch.ones(1)}, tmp_path / file)
    with pytest.raises(WeightsMistake, match=sentence):
        load_network(name, tmp_path / file if file else None, tmp_path, entry)
