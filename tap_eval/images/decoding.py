"""Rows of labelled images, not yet decoded, and how they become pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tap_eval.images.classes import plain
from tap_eval.images.depth import RangeMistake, in_eight_bits
from tap_eval.images.images import IMAGENET_MEAN, IMAGENET_STD, Images, Remark, Room, Transform
from tap_eval.mistake import ImagesMistake

UNREADABLE = "cannot be decoded"
_MOST_UNREADABLE = 0.01


class Undecodable(Exception):
    """An image that cannot be decoded; `str()` of it is the reason."""


@contextmanager
def opened(read: Callable[[int], Image.Image], row: int) -> Iterator[Image.Image]:
    """The image that `read` gives, closed at the end; raises `Undecodable` when it cannot be opened or used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which are not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with read(row) as image:
                yield image
    except RangeMistake:
        raise
    except UnidentifiedImageError as error:
        raise Undecodable("it is no image that Pillow knows") from error
    except Exception as error:  # what a damaged file makes of a decoder is anybody's guess
        raise Undecodable(plain(error) or type(error).__name__) from error


@dataclass(frozen=True)
class Source:
    """Rows of images, not yet decoded; `pool` are the rows that calibration may draw from."""

    name: str
    classes: tuple[str, ...]
    labels: Sequence[int]
    read: Callable[[int], Image.Image]
    """opens the image of a row, in any mode; what it raises makes the image one that cannot be decoded"""
    transform: Transform
    """of images that are given no other"""
    pool: range | None = None
    channels: int = 3
    """of images that are not for a network of others: 1 for grey, 3 for colour"""
    place: Callable[[int], str] = "row {}".format
    """where a row is, for a user"""
    notes: tuple[str, ...] = ()
    """what a user should know of the source before any image is decoded"""
    order: str = ""
    """which label is which class, in a sentence"""
    data: str = ""
    """what the data is called, where it says so"""

    def decode(
        self, rows: Sequence[int], transform: Transform | None, room: Room = np.empty, channels: int | None = None
    ) -> Images:
        """The images of `rows` without those that cannot be decoded, of `channels` where `transform` does not say.

        Raises `ImagesMistake` when those are many, when an image has values that cannot be brought
        to 8 bits, or when there are several sizes.
        """
        transform = transform or self.transform
        cut = transform.cut(channels or self.channels)
        pixels = np.empty((0, 1, 1, 1), dtype=np.uint8)
        decoded: list[int] = []
        remarks: dict[int, tuple[Remark, ...]] = {}
        failed: list[int] = []
        for row in rows:
            try:
                with opened(self.read, row) as picture:
                    reduced, said = in_eight_bits(picture, transform)
                    image = cut(reduced).numpy()
            except Undecodable as error:
                failed.append(row)
                remarks[row] = (Remark(UNREADABLE, str(error)),)
                continue
            except RangeMistake as error:
                raise ImagesMistake(f"{self.name}: {self.place(row)} {error}") from error
            if not decoded:
                pixels = room((len(rows), *image.shape), np.dtype(np.uint8))
            if image.shape != pixels.shape[1:]:
                raise several_sizes(self.name, pixels, self.name, image)
            if said:
                remarks[row] = said
            pixels[len(decoded)] = image
            decoded.append(row)
        if len(failed) > _MOST_UNREADABLE * len(rows):
            (note,) = self.told({row: remarks[row] for row in failed}, len(rows), transform)
            raise ImagesMistake(f"{note}; remove or repair them, fewer than one in a hundred would be skipped.")
        labels = torch.tensor([self.labels[row] for row in decoded])
        return Images(pixels[: len(decoded)], labels, transform, remarks)

    def told(self, remarks: Mapping[int, Sequence[Remark]], of: int, transform: Transform) -> tuple[str, ...]:
        """A sentence a kind of remark, on rows among `of` that were decoded."""
        kinds: dict[str, list[tuple[int, Remark]]] = {}
        for row in sorted(remarks):
            for remark in remarks[row]:
                kinds.setdefault(remark.kind, []).append((row, remark))
        return tuple(self._sentence(kind, found, of, transform) for kind, found in kinds.items())

    def _sentence(self, kind: str, found: list[tuple[int, Remark]], of: int, transform: Transform) -> str:
        row, first = found[0]
        reason = f": {first.reason}" if first.reason else ""
        note = f"{self.name}: {len(found):,} of {of:,} images {kind}, first {self.place(row)}{reason}"
        greatest = max(remark.greatest for _, remark in found)
        if 2 * greatest >= first.white:
            return note
        return (
            f"{note}; their greatest value is {greatest:,.6g}, so they are dark: if another is white, give "
            f"--transform {transform.text(white='VALUE')}"
        )

    def taken(self, transform: Transform | None, network: Callable[[Tensor], Any]) -> tuple[int, str]:
        """How many channels `network` takes, and what is to be said of that.

        Those of the images are tried first, on two black ones. Where the network runs on neither
        grey nor colour they stay, and it is for others to say what it wants.
        """
        transform = transform or self.transform
        if transform.channels:
            return transform.channels, ""
        size = first_size(self.read, len(self.labels))
        for channels in (self.channels, 4 - self.channels):
            black = transform.cut(channels)(Image.new("RGB", size)).expand(2, -1, -1, -1)
            with suppress(Exception), torch.no_grad():  # a network's code may raise anything
                network(transform.normalize(black))
                return channels, _grey(self.name, transform) if channels == 1 != self.channels else ""
        return self.channels, ""


def _grey(name: str, transform: Transform) -> str:
    note = f"{name}: images are made grey, since the network takes one channel"
    if (transform.mean, transform.std) != (IMAGENET_MEAN, IMAGENET_STD):
        return note
    return (
        f"{note}, and normalized with the average of ImageNet's mean and of its standard deviation: if it was trained "
        f"with others, give them with --transform {transform.text(mean='MEAN', std='STD')}"
    )


def several_sizes(name: str, one: np.ndarray, other_name: str, other: np.ndarray) -> ImagesMistake:
    height, width = one.shape[-2:]
    return ImagesMistake(
        f"{name} has images of {width} x {height} pixels, {other_name} of {other.shape[-1]} x {other.shape[-2]}: bring "
        "them to one size with --transform, as in 'resize=256,crop=224'."
    )


def first_size(read: Callable[[int], Image.Image], rows: int) -> tuple[int, int]:
    """Width and height of the first image that can be opened; raises `ImagesMistake` when many cannot."""
    tried = range(min(rows, 100))
    reasons: list[str] = []
    for row in tried:
        try:
            with opened(read, row) as image:
                return image.size
        except Undecodable as error:
            reasons.append(str(error))
    raise ImagesMistake(f"the first {len(tried):,} images cannot be decoded ({reasons[0]}); remove or repair them.")
