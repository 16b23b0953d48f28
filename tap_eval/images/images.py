"""Labelled images: how they are cut and normalized, kept as bytes, and become tensors batch by batch."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor
from torchvision.transforms import v2

from tap_eval.device import CPU
from tap_eval.mistake import ImagesMistake

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Transform(BaseModel):
    """How an image becomes a tensor: resize the short side, crop the centre, scale to [0, 1], normalize."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    resize: int | None = Field(None, ge=1)
    """short side in pixels"""
    crop: int | None = Field(None, ge=1)
    """side of the centre crop in pixels"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; unset, what the network takes"""
    white: float | None = Field(None, gt=0, allow_inf_nan=False)
    """the value that is white in images of 16 bits and more; unset, 65,535 for integers and 1 for floats"""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """of each channel in [0, 1], taken off; one number for all, and three are averaged for grey"""
    std: tuple[float, ...] = IMAGENET_STD
    """of each channel, divided by; as with the mean"""

    @field_validator("channels", mode="before")
    @classmethod
    def _number(cls, given: object) -> object:
        return int(given) if isinstance(given, str) and given.isdecimal() else given

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _numbers(cls, given: object) -> object:
        """A number alone is one channel's; in text there are slashes between numbers."""
        return given.split("/") if isinstance(given, str) else (given,) if isinstance(given, int | float) else given

    @field_validator("mean", "std")
    @classmethod
    def _one_or_three(cls, numbers: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
            raise ValueError("give one finite number or three")
        if info.field_name == "std" and min(numbers) <= 0:
            raise ValueError("give numbers above 0")
        return numbers

    def text(self, **besides: str) -> str:
        """As `--transform` takes it, with further or other settings: `resize=256,crop=224,mean=0.5/0.5/0.5`."""
        given = self.model_dump(exclude_defaults=True)
        numbers = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
        texts = {name: "/".join(map(str, values)) for name, values in numbers.items()} | besides
        return ",".join(f"{name}={text}" for name, text in texts.items())

    def cut(self, channels: int) -> Callable[[Image.Image], Tensor]:
        """PIL image of 8 bits to (C, H, W) uint8, of `channels` unless the transform has its own.

        Grey is what Pillow makes of colour (ITU-R 601-2 luma).
        """
        mode = "L" if (self.channels or channels) == 1 else "RGB"
        steps: list[Any] = [lambda image: image if image.mode == mode else image.convert(mode)]
        if self.resize:
            steps.append(v2.Resize(self.resize, v2.InterpolationMode(self.interpolation), antialias=True))
        if self.crop:
            steps.append(v2.CenterCrop(self.crop))
        return v2.Compose([*steps, v2.PILToTensor()])

    def normalize(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) uint8 to float32."""
        mean, std = (
            [sum(numbers) / len(numbers)] if pixels.shape[1] == 1 else list(numbers)
            for numbers in (self.mean, self.std)
        )
        normalized: Tensor = v2.functional.normalize(
            v2.functional.to_dtype(pixels, torch.float32, scale=True), mean, std
        )
        return normalized


AS_THEY_ARE = Transform()
IMAGENET = Transform(resize=256, crop=224)


class Remark(NamedTuple):
    """Something to be said of an image."""

    kind: str
    """what is said of all such images, as in "3 of 10 images have several frames" """
    reason: str = ""
    greatest: float = 0.0
    """its greatest value, and the one that is white, where it has more than 8 bits"""
    white: float = 0.0


@dataclass(frozen=True)
class Images:
    """Images as bytes, in memory or in a file, that become tensors batch by batch."""

    stored: np.ndarray
    """(M, C, H, W) uint8"""
    labels: Tensor
    """(N,) int64"""
    transform: Transform
    """whose `normalize` makes tensors of them"""
    remarks: Mapping[int, Sequence[Remark]] = field(default_factory=dict)
    """what is to be said of the images, by their rows in the source"""
    rows: np.ndarray | None = None
    """which N of the M these are, or None for all"""
    device: torch.device = CPU
    """on which tensors are made, of bytes that are brought there batch by batch"""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Width in pixels."""
        return int(self.stored.shape[-1])

    @property
    def pixels(self) -> Tensor:
        """All of them, (N, C, H, W) float32, normalized."""
        (pixels,) = self.split(len(self))
        return pixels

    def split(self, size: int) -> Iterator[Tensor]:
        """The pixels, `size` images at a time, as `Tensor.split` gives them."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            chosen = self.stored[: len(self)][part] if self.rows is None else self.stored[self.rows[part]]
            yield self.transform.normalize(torch.from_numpy(chosen.copy()).to(self.device))

    def only(self, rows: np.ndarray) -> Images:
        """Those of `rows`, without a copy of the pixels."""
        return replace(
            self, labels=self.labels[torch.from_numpy(rows)], rows=rows if self.rows is None else self.rows[rows]
        )

    def on(self, device: torch.device) -> Images:
        """The same, as tensors on `device`; the labels stay where they are."""
        return replace(self, device=device)

    @cached_property
    def digest(self) -> str:
        """Names the content, labels included."""
        content = hashlib.sha256()
        for part in self.split(1000):
            content.update(part.cpu().contiguous().numpy().tobytes())
        content.update(self.labels.numpy().tobytes())
        return content.hexdigest()[:32]


Room = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
"""Makes an array of a shape and a type, to be filled."""


def room_in(folder: Path, memory: int) -> Room:
    """Arrays in memory, or those that would take more than `memory` bytes in files without a name in `folder`.

    The files go with the arrays. Raises `ImagesMistake` when the disk is too small.
    """

    def room(shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        size = math.prod(shape) * kind.itemsize
        if size <= memory:
            return np.empty(shape, kind)
        folder.mkdir(parents=True, exist_ok=True)
        if size > (free := shutil.disk_usage(folder).free):
            raise ImagesMistake(
                f"{folder} has {free / 2**20:,.0f} MiB free, the decoded images take {size / 2**20:,.0f}: "
                "free some, point TAP_CACHE at another disk, or give smaller --search and --test."
            )
        with tempfile.TemporaryFile(dir=folder) as file:
            return np.memmap(file, kind, "w+", shape=shape).view(np.ndarray)

    return room


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets; `calibrations` holds one or more draws of calibration images."""

    name: str
    classes: tuple[str, ...]
    calibrations: Sequence[Images]
    search: Images
    test: Images
    notes: tuple[str, ...] = ()
    """what a user should know of them, a sentence each"""
    data: str = "images"
    """what the data is called"""
