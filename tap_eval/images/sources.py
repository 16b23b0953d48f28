"""Named sources of labelled images, and how they are split.

A source is `digits`, `parquet:FILE`, `imagefolder:DIR` or `cifar10:DIR`. The calibration
images, the search split and the test split are disjoint: the search split is the first rows
of the source, the test split its last, and the calibration images are drawn by seed from a
source of their own, or else from the rows between the two.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from tap_eval.images.images import AS_THEY_ARE, IMAGENET, Images, Room, Splits, Transform
from tap_eval.mistake import ImagesMistake

SOURCES = "digits, parquet:FILE, imagefolder:DIR or cifar10:DIR"
_MOST_UNREADABLE = 0.01


@dataclass(frozen=True)
class Source:
    """Rows of images, not yet decoded; `pool` are the rows that calibration may draw from."""

    name: str
    classes: tuple[str, ...]
    labels: Sequence[int]
    read: Callable[[int], Image.Image]
    transform: Transform
    pool: range | None = None

    def decode(self, rows: Sequence[int], transform: Transform | None, room: Room = np.empty) -> Images:
        """The images of `rows` without those that cannot be decoded; raises `ImagesMistake` when those are many."""
        transform = transform or self.transform
        cut = transform.cut()
        pixels = np.empty((0, 1, 1, 1), dtype=np.uint8)
        decoded: list[int] = []
        failed: list[str] = []
        for row in rows:
            try:
                image = cut(self.read(row)).numpy()
            except (OSError, UnidentifiedImageError, ValueError, TypeError, RuntimeError) as error:
                failed.append(f"row {row}: {error}")
                continue
            if not decoded:
                pixels = room((len(rows), *image.shape), np.dtype(np.uint8))
            if image.shape != pixels.shape[1:]:
                raise ImagesMistake(
                    f"{self.name} has images of several sizes, {pixels.shape[1:]} and {image.shape} among them: "
                    "bring them to one with --transform, as in 'resize=256,crop=224'."
                )
            pixels[len(decoded)] = image
            decoded.append(row)
        note = (
            f"{self.name}: {len(failed)} of {len(rows):,} images cannot be decoded, first {failed[0]}" if failed else ""
        )
        if len(failed) > _MOST_UNREADABLE * len(rows):
            raise ImagesMistake(f"{note}; remove or repair them, fewer than one in a hundred would be skipped.")
        labels = torch.tensor([self.labels[row] for row in decoded])
        return Images(pixels[: len(decoded)], labels, transform, note)


def split(
    source: Source,
    *,
    calibration: Source | None,
    seed: int,
    draws: int = 1,
    count: int = 16,
    search: int | None = None,
    test: int | None = None,
    transform: Transform | None = None,
    room: Room = np.empty,
) -> Splits:
    """The first `search` rows, the last `test` rows, and `draws` draws of `count` calibration images.

    Unset sizes take what is left after a pool for calibration, at most 2,500 each. `room` holds
    the two splits. Raises `ImagesMistake` when the source is too small or the calibration source has other classes.
    """
    if calibration and calibration.name == source.name:
        calibration = None
    total = len(source.labels)
    start = source.pool.stop if source.pool else 0
    reserve = 0 if calibration or source.pool else max(count, min(count * draws, total // 4))
    spare = total - start - reserve
    search = min(2500, spare // 2) if search is None else search
    test = min(2500, spare - search) if test is None else test
    if search < 1 or test < 1 or search + test > spare:
        raise ImagesMistake(
            f"{source.name} has {total:,} images, {max(spare, 0):,} of them free for search and test: "
            f"{search:,} + {max(test, 1):,} are needed; give smaller --search and --test."
        )
    if calibration and calibration.classes != source.classes:
        raise ImagesMistake(
            f"{calibration.name} has the classes {_few(calibration.classes)}, {source.name} has "
            f"{_few(source.classes)}: calibrate on images of the same task."
        )
    drawn_from = calibration or source
    if calibration:
        pool = calibration.pool or range(len(calibration.labels))
    else:
        pool = source.pool or range(start + search, total - test)
    if len(pool) < count:
        raise ImagesMistake(f"{drawn_from.name} has {len(pool)} images to calibrate on; {count} are needed.")
    return Splits(
        source.name,
        source.classes,
        tuple(
            drawn_from.decode(sorted(random.Random(f"{seed}/{draw}").sample(pool, count)), transform)
            for draw in range(draws)
        ),
        source.decode(range(start, start + search), transform, room),
        source.decode(range(total - test, total), transform, room),
    )


def open_source(spec: str) -> Source:
    """The source that `spec` names; raises `ImagesMistake` when there is none or it is empty."""
    kind, _, where = spec.partition(":")
    opener = {"parquet": _parquet, "imagefolder": _imagefolder, "cifar10": _cifar10}.get(kind)
    if spec == "digits":
        source = digits()
    elif opener is None or not where:
        raise ImagesMistake(f"'{spec}' is no image source: give {SOURCES}.")
    else:
        source = opener(Path(where).expanduser())
    if not len(source.labels):
        raise ImagesMistake(f"{spec} has no images: give a source with some.")
    return replace(source, name=spec)


def digits() -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8; the first 697 are for training and calibration."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = (data.images[order] * (255 / 16)).astype(np.uint8)
    return Source(
        "digits",
        tuple(str(digit) for digit in range(10)),
        data.target[order].tolist(),
        lambda row: Image.fromarray(pixels[row]),
        Transform(mean=(0.5,), std=(0.5,)),
        pool=range(697),
    )


def _parquet(path: Path) -> Source:
    """Hugging Face's convention: `image` = struct(bytes, path), `label` an integer, names in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, memory_map=True)
        names = set(file.schema_arrow.names)
        table = file.read(columns=[*names & {"label"}])
    except (OSError, pa.ArrowException) as error:
        raise ImagesMistake(f"{path} cannot be read as Parquet ({error}); give an existing .parquet file.") from error
    if missing := {"image", "label"} - names:
        raise ImagesMistake(
            f"{path} has no column {' or '.join(sorted(missing))}; image = struct(bytes, path) and label are needed."
        )
    image = file.schema_arrow.field("image").type
    if not pa.types.is_struct(image) or "bytes" not in image.names or not pa.types.is_binary(image["bytes"].type):
        raise ImagesMistake(f"{path} has an image column of {image}; struct(bytes: binary, path: string) is needed.")
    label = file.schema_arrow.field("label").type
    if not pa.types.is_integer(label) or table["label"].null_count:
        what = f"{table['label'].null_count} nulls" if table["label"].null_count else str(label)
        raise ImagesMistake(f"{path} has a label column with {what}; an integer for each image is needed.")
    labels: list[int] = table["label"].to_pylist()
    features = (
        json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    )
    classes = features.get("label", {}).get("names") or [str(label) for label in range(max(labels, default=-1) + 1)]
    if wrong := [value for value in labels if not 0 <= value < len(classes)]:
        raise ImagesMistake(f"{path} has the label {wrong[0]}; labels go from 0 to {len(classes) - 1} here.")
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = [0, *itertools.accumulate(counts)]

    @lru_cache(1)
    def images(group: int) -> Any:
        return file.read_row_group(group, columns=["image"])["image"]

    def read(row: int) -> Image.Image:
        group = bisect.bisect_right(starts, row) - 1
        return Image.open(io.BytesIO(images(group)[row - starts[group]]["bytes"].as_py())).convert("RGB")

    return Source(f"parquet:{path.name}", tuple(classes), labels, read, _fitting(read, len(labels)))


def _imagefolder(path: Path) -> Source:
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(path))
    except (OSError, FileNotFoundError) as error:
        raise ImagesMistake(f"{path} has no images in class folders ({error}); give DIR/CLASS/IMAGE.") from error
    rows = list(folder.samples)
    random.Random(0).shuffle(rows)  # the folder lists class after class; splits need all of them

    def read(row: int) -> Image.Image:
        return Image.open(rows[row][0]).convert("RGB")

    return Source(
        f"imagefolder:{path.name}", tuple(folder.classes), [label for _, label in rows], read, _fitting(read, len(rows))
    )


def _cifar10(path: Path) -> Source:
    from torchvision.datasets import CIFAR10

    try:
        train, held_out = (CIFAR10(str(path), train=train) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise ImagesMistake(
            f"{path} has no CIFAR-10 batches ({error}); give the folder above cifar-10-batches-py."
        ) from error
    pixels = np.concatenate([train.data, held_out.data])
    return Source(
        "cifar10",
        tuple(train.classes),
        [*train.targets, *held_out.targets],
        lambda row: Image.fromarray(pixels[row]),
        AS_THEY_ARE,
        pool=range(len(train.targets)),
    )


def _fitting(read: Callable[[int], Image.Image], rows: int) -> Transform:
    """Small images are taken as they are; larger ones get ImageNet's resize and centre crop."""
    if not rows:
        return AS_THEY_ARE
    try:
        return AS_THEY_ARE if max(read(0).size) <= 64 else IMAGENET
    except (OSError, UnidentifiedImageError, ValueError, TypeError) as error:
        raise ImagesMistake(f"the first image cannot be decoded ({error}); remove or repair it.") from error


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''} ({len(names)})"
