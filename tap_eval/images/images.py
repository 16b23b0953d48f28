"""Labelled images: how they are cut and normalized, kept as bytes, and become tensors batch by batch."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torchvision.transforms import v2

from tap_eval.mistake import ImagesMistake

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Transform(BaseModel):
    """How an image becomes a tensor: resize the short side, crop the centre, scale to [0, 1], normalize."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    resize: int | None = None
    """short side in pixels"""
    crop: int | None = None
    """side of the centre crop in pixels"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    """of each channel in [0, 1], taken off"""
    std: tuple[float, ...] = IMAGENET_STD
    """of each channel, divided by"""

    def cut(self) -> Callable[[Image.Image], Tensor]:
        """PIL image to (C, H, W) uint8."""
        steps: list[Any] = []
        if self.resize:
            steps.append(v2.Resize(self.resize, v2.InterpolationMode(self.interpolation), antialias=True))
        if self.crop:
            steps.append(v2.CenterCrop(self.crop))
        return v2.Compose([*steps, v2.PILToTensor()])

    def normalize(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) uint8 to float32."""
        normalized: Tensor = v2.functional.normalize(
            v2.functional.to_dtype(pixels, torch.float32, scale=True), list(self.mean), list(self.std)
        )
        return normalized


AS_THEY_ARE = Transform()
IMAGENET = Transform(resize=256, crop=224)


@dataclass(frozen=True)
class Images:
    """Images as bytes, in memory or in a file, that become tensors batch by batch."""

    stored: np.ndarray
    """(M, C, H, W) uint8"""
    labels: Tensor
    """(N,) int64"""
    transform: Transform
    """whose `normalize` makes tensors of them"""
    note: str = ""
    """what was skipped, in a sentence"""
    rows: np.ndarray | None = None
    """which N of the M these are, or None for all"""

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
            yield self.transform.normalize(torch.from_numpy(chosen.copy()))

    def only(self, rows: np.ndarray) -> Images:
        """Those of `rows`, without a copy of the pixels."""
        return replace(
            self, labels=self.labels[torch.from_numpy(rows)], rows=rows if self.rows is None else self.rows[rows]
        )

    @cached_property
    def digest(self) -> str:
        """Names the content, labels included."""
        content = hashlib.sha256()
        for part in self.split(1000):
            content.update(part.contiguous().numpy().tobytes())
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
    calibrations: tuple[Images, ...]
    search: Images
    test: Images
