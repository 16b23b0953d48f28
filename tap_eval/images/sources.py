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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tap_eval.images.classes import UNNAMED, data_of, few, labels_in, order, plain
from tap_eval.images.decoding import Source, first_size, several_sizes
from tap_eval.images.folder import ENDINGS, read_folder
from tap_eval.images.images import AS_THEY_ARE, IMAGENET, Images, Room, Splits, Transform
from tap_eval.mistake import ImagesMistake

_LONGEST_NAME = 100
"""characters of what a file says that its data is called"""
SOURCES = "digits, parquet:FILE, imagefolder:DIR or cifar10:DIR"


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
    network: Callable[[Tensor], Any] | None = None,
) -> Splits:
    """The first `search` rows, the last `test` rows, and `draws` draws of `count` calibration images.

    Unset sizes take what is left after a pool for calibration, at most 2,500 each. `room` holds
    the two splits. All images, those to calibrate on too, are cut and normalized by `transform` or
    the source's own, with as many channels as `network` takes: it is tried on two images. Raises
    `ImagesMistake` when the source is too small, or the calibration source has other classes or sizes.
    """
    if calibration and _place(calibration.name) == _place(source.name):
        calibration = None
    if calibration and calibration.classes != source.classes:
        raise ImagesMistake(
            f"{calibration.name} has the classes {few(calibration.classes)}, {source.name} has "
            f"{few(source.classes)}: calibrate on images of the same task."
        )
    drawn_from = calibration or source
    own = calibration is None and source.pool is None
    apart = range(0) if own else drawn_from.pool or range(len(drawn_from.labels))
    if not own and len(apart) < count:
        raise ImagesMistake(
            f"{drawn_from.name} has {len(apart):,} images to calibrate on and {count:,} are needed: give more, or "
            f"--calibration-images {len(apart)}."
        )
    total = len(source.labels)
    start = source.pool.stop if source.pool else 0
    reserve = max(count, min(count * draws, total // 4)) if own else 0
    search, test = _sizes(source.name, total, reserve, total - start - reserve, search, test)
    pool = range(start + search, total - test) if own else apart
    transform = transform or source.transform
    channels, grey = source.taken(transform, network) if network else (source.channels, "")
    draw = [sorted(random.Random(f"{seed}/{number}").sample(pool, count)) for number in range(draws)]
    calibrations = tuple(drawn_from.decode(rows, transform, channels=channels) for rows in draw)
    searched = source.decode(range(start, start + search), transform, room, channels)
    tested = source.decode(range(total - test, total), transform, room, channels)
    for name, images in [(source.name, tested), *((drawn_from.name, images) for images in calibrations)]:
        if images.stored.shape[1:] != searched.stored.shape[1:]:
            raise several_sizes(source.name, searched.stored, name, images.stored)
    seen = dict(searched.remarks) | dict(tested.remarks)
    drawn = {row: said for images in calibrations for row, said in images.remarks.items()}
    rows = len({row for rows in draw for row in rows})
    if calibration:
        told = source.told(seen, search + test, transform) + calibration.told(drawn, rows, transform)
        told += _met_again(calibration.name, calibrations, {"searched on": searched, "tested on": tested})
    else:
        told = source.told(seen | drawn, search + test + rows, transform)
    by_calibration = calibration.notes if calibration else ()
    notes = [source.order, _sorted(source), *source.notes, *by_calibration, grey, *told]
    told_of = tuple(filter(None, notes))
    return Splits(source.name, source.classes, calibrations, searched, tested, told_of, source.data or UNNAMED)


def _sorted(source: Source) -> str:
    """What is said of one that has class after class."""
    classes = len(set(source.labels))
    changes = sum(one != other for one, other in itertools.pairwise(source.labels))
    if classes < 2 or changes >= classes or len(source.labels) < 2 * classes:
        return ""
    return f"{source.name} is sorted by class, so that search and test images may be of other classes: shuffle its rows"


def _place(spec: str) -> tuple[str, Path]:
    """The same of all spellings of a source."""
    kind, _, where = spec.partition(":")
    return kind, Path(where).expanduser().resolve()


def _met_again(name: str, calibrations: Sequence[Images], splits: Mapping[str, Images]) -> tuple[str, ...]:
    """Notes on calibration images that are among those of `splits` too, to the pixel."""
    drawn = {image.tobytes() for images in calibrations for image in images.stored}
    counts = {
        what: sum(image.tobytes() in drawn for image in images.stored[: len(images)]) for what, images in splits.items()
    }
    return tuple(
        f"{name}: calibration images are among those that are {what}, {count:,} of {len(splits[what]):,} are the same "
        "to the pixel: give others"
        for what, count in counts.items()
        if count
    )


def _sizes(name: str, total: int, reserve: int, spare: int, search: int | None, test: int | None) -> tuple[int, int]:
    """How many of the `spare` images are searched and tested; raises `ImagesMistake` with sizes that are accepted."""
    first = min(2500, spare // 2, max(spare - (test or 0), 1)) if search is None else search
    last = min(2500, spare - first) if test is None else test
    if first >= 1 and last >= 1 and first + last <= spare:
        return first, last
    has = f"{name} has {total:,} images, {max(spare, 0):,} of them free for search and test"
    if spare < 2:
        fewer = f", or --calibration-images {total - 2} or fewer" if total > 2 else ""
        own = f", others to calibrate on with --calibration{fewer}" if reserve else ""
        raise ImagesMistake(f"{has}, where each needs one: give more images{own}.")
    wish = test or spare // 2
    fits = min(max(first, 1), max(spare // 2, spare - wish))
    raise ImagesMistake(
        f"{has}, and {first:,} + {max(last, 1):,} are needed: give --search {fits} --test {min(wish, spare - fits)}."
    )


def open_source(spec: str, classes: Path | None = None) -> Source:
    """The source that `spec` names, its labels those of the file `classes` where there is one.

    Raises `ImagesMistake` when there is none, it is empty, or the file does not name its classes.
    """
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
    source = replace(source, name=spec, data=source.data or data_of(source.classes))
    if classes:
        source = _relabelled(source, classes)
    return replace(source, order=order(spec, source.classes, given=classes is not None))


def _relabelled(source: Source, path: Path) -> Source:
    """With the labels that the classes have in the file at `path`."""
    names, labels = labels_in(path, source.name, source.classes)
    present = set(labels)
    absent = [name for label, name in enumerate(names) if label not in present]
    note = f"{source.name}: of the {len(names):,} classes in {path} there are no images of {few(absent)}"
    return replace(
        source,
        classes=names,
        labels=[labels[label] for label in source.labels],
        notes=(*source.notes, *([note] if absent else [])),
    )


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
        channels=1,
        data="digits",
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
    info = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    classes = info.get("features", {}).get("label", {}).get("names") or [
        str(label) for label in range(max(labels, default=-1) + 1)
    ]
    if wrong := [value for value in labels if not 0 <= value < len(classes)]:
        raise ImagesMistake(f"{path} has the label {wrong[0]}; labels go from 0 to {len(classes) - 1} here.")
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = [0, *itertools.accumulate(counts)]

    @lru_cache(1)
    def images(group: int) -> Any:
        return file.read_row_group(group, columns=["image"])["image"]

    def read(row: int) -> Image.Image:
        group = bisect.bisect_right(starts, row) - 1
        return Image.open(io.BytesIO(images(group)[row - starts[group]]["bytes"].as_py()))

    data = plain(info.get("dataset_name") or "")[:_LONGEST_NAME]
    return Source(f"parquet:{path.name}", tuple(classes), labels, read, _fitting(read, len(labels)), data=data)


def _imagefolder(path: Path) -> Source:
    classes, images, others = read_folder(path)
    rows = list(images)
    random.Random(0).shuffle(rows)  # the folder lists class after class; splits need all of them

    def read(row: int) -> Image.Image:
        return Image.open(path / rows[row][0])

    note = (
        f"imagefolder:{path}: {len(others):,} of {len(others) + len(rows):,} files left out, first "
        f"{plain(others[0])}; images are CLASS/IMAGE that end in {ENDINGS}"
        if others
        else ""
    )
    return Source(
        f"imagefolder:{path.name}",
        classes,
        [label for _, label in rows],
        read,
        _fitting(read, len(rows)),
        place=lambda row: plain(rows[row][0]),
        notes=(note,) if note else (),
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
        data="CIFAR-10",
    )


def _fitting(read: Callable[[int], Image.Image], rows: int) -> Transform:
    """Small images are taken as they are; larger ones get ImageNet's resize and centre crop."""
    return AS_THEY_ARE if not rows or max(first_size(read, rows)) <= 64 else IMAGENET
