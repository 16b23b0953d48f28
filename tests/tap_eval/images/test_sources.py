"""Sources, splits that share no image, and what is said of those that cannot be used."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tap_eval.images.images import Splits, Transform, room_in
from tap_eval.images.sources import digits, open_source, split
from tap_eval.mistake import ImagesMistake


def png(value: int, size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes], labels: list[int]) -> str:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": image, "path": None} for image in images],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": pa.array(labels, pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return f"parquet:{path}"


@pytest.fixture
def parquet(tmp_path: Path) -> str:
    return write_parquet(tmp_path / "some.parquet", [png(i) for i in range(100)], [i % 2 for i in range(100)])


def contents(splits: Splits) -> list[set[bytes]]:
    parts = [*splits.calibrations, splits.search, splits.test]
    return [{image.numpy().tobytes() for image in part.pixels} for part in parts]


def test_splits_share_no_image(parquet: str) -> None:
    splits = split(open_source(parquet), calibration=None, seed=0, count=8, draws=2)
    first, second, search, test = contents(splits)
    assert not (first | second) & search
    assert not (first | second) & test
    assert not search & test
    assert splits.classes == ("cat", "dog")


def test_digits_are_calibrated_on_rows_that_no_split_holds() -> None:
    splits = split(digits(), calibration=None, seed=0, draws=3)
    assert (len(splits.search), len(splits.test)) == (550, 550)
    labels = splits.search.labels.bincount(minlength=10)
    assert labels.min() > 40


def test_the_draw_is_the_seeds() -> None:
    one, same, other = (split(digits(), calibration=None, seed=seed).calibrations[0].digest for seed in (0, 0, 1))
    assert one == same != other


def test_the_first_rows_are_searched_and_the_last_tested(parquet: str) -> None:
    splits = split(open_source(parquet), calibration=None, seed=0, count=8, search=10, test=5)
    assert splits.search.labels.tolist() == [0, 1] * 5
    assert splits.test.labels.tolist() == [1, 0, 1, 0, 1]


def test_a_transform_replaces_the_sources_own(parquet: str) -> None:
    transform = Transform(resize=20, crop=16)
    splits = split(open_source(parquet), calibration=None, seed=0, count=8, transform=transform)
    assert splits.search.pixels.shape[-2:] == (16, 16)
    assert open_source(parquet).transform == Transform()


def test_images_in_a_file_are_the_images_in_memory_and_leave_nothing_behind(parquet: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    here = split(open_source(parquet), calibration=None, seed=0, count=8)
    there = split(open_source(parquet), calibration=None, seed=0, count=8, room=room_in(folder, memory=1000))
    assert there.search.digest == here.search.digest
    rows = np.array([1, 4, 5])
    some = there.search.only(rows).only(np.array([2, 0]))
    assert (some.pixels == here.search.pixels[[5, 1]]).all()
    assert some.labels.tolist() == here.search.labels[[5, 1]].tolist()
    assert [len(part) for part in here.search.split(20)] == [20, 20, len(here.search) - 40]
    assert not list(folder.iterdir())
    with pytest.raises(ImagesMistake, match="MiB free, the decoded images take"):
        room_in(folder, memory=0)((10**9, 3, 224, 224), np.dtype(np.uint8))


def test_parquet_is_read_a_row_group_at_a_time(parquet: str, tmp_path: Path) -> None:
    pq.write_table(pq.read_table(parquet.removeprefix("parquet:")), tmp_path / "grouped.parquet", row_group_size=7)
    grouped, whole = (open_source(spec) for spec in (f"parquet:{tmp_path / 'grouped.parquet'}", parquet))
    rows = [99, 0, 6, 7, 50]
    assert grouped.decode(rows, None).digest == whole.decode(rows, None).digest


def test_image_folders_are_shuffled_over_classes(tmp_path: Path) -> None:
    for name in ("ants", "bees"):
        (tmp_path / name).mkdir()
        for index in range(40):
            (tmp_path / name / f"{index}.png").write_bytes(png(index))
    splits = split(open_source(f"imagefolder:{tmp_path}"), calibration=None, seed=0, count=8)
    assert splits.classes == ("ants", "bees")
    assert 0 < splits.search.labels.float().mean() < 1


def test_what_cannot_be_used_is_said_in_a_sentence(tmp_path: Path, parquet: str) -> None:
    (tmp_path / "empty").mkdir()
    bad = write_parquet(tmp_path / "bad.parquet", [png(0)] * 30 + [b"no image"], [0] * 31)
    mixed = write_parquet(tmp_path / "mixed.parquet", [png(0), png(0, (16, 16))] * 20, [0] * 40)
    none = write_parquet(tmp_path / "none.parquet", [], [])
    (tmp_path / "text.parquet").write_text("no parquet")
    typed = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": png(0), "path": None}] * 40, typed)
    for name, columns in {
        "strings": {"image": image, "label": ["cat"] * 40},
        "nulls": {"image": image, "label": pa.array([None] * 40, pa.int64())},
        "negative": {"image": image, "label": [-1] * 40},
        "paths": {"image": ["a.png"] * 40, "label": [0] * 40},
        "empty": {"image": pa.array([{"bytes": None, "path": "a"}] * 40, typed), "label": [0] * 40},
    }.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    cases = {
        "foo": "'foo' is no image source",
        "parquet:": "no image source",
        f"parquet:{tmp_path}/absent.parquet": "cannot be read as Parquet",
        f"parquet:{tmp_path}/text.parquet": "cannot be read as Parquet",
        f"imagefolder:{tmp_path}/empty": "no images in class folders",
        f"cifar10:{tmp_path}": "has no CIFAR-10 batches",
        none: "has no images",
        bad: "1 of 14 images cannot be decoded, first row 30",
        mixed: "32 x 32 pixels, .* of 16 x 16",
        f"parquet:{tmp_path}/strings.parquet": "label column with string",
        f"parquet:{tmp_path}/nulls.parquet": "label column with 40 nulls",
        f"parquet:{tmp_path}/negative.parquet": "has the label -1",
        f"parquet:{tmp_path}/paths.parquet": "image column of string",
        f"parquet:{tmp_path}/empty.parquet": "the first 40 images cannot be decoded",
    }
    for source, sentence in cases.items():
        with pytest.raises(ImagesMistake, match=sentence):
            split(open_source(source), calibration=None, seed=0, count=4)
    with pytest.raises(ImagesMistake, match="90 \\+ 20 are needed"):
        split(open_source(parquet), calibration=None, seed=0, count=8, search=90, test=20)
    with pytest.raises(ImagesMistake, match="calibrate on images of the same task"):
        split(open_source(parquet), calibration=digits(), seed=0)


def test_a_few_images_that_cannot_be_decoded_are_skipped_and_named(tmp_path: Path) -> None:
    images = [png(index % 256) for index in range(400)]
    images[7] = b"no image"
    source = open_source(write_parquet(tmp_path / "some.parquet", images, [index % 2 for index in range(400)]))
    splits = split(source, calibration=None, seed=0, count=8, search=150, test=150)
    assert (len(splits.search), len(splits.test)) == (149, 150)
    assert any("1 of 308 images cannot be decoded, first row 7: it is no image" in note for note in splits.notes)
    assert splits.search.labels.tolist() == [index % 2 for index in range(150) if index != 7]


def test_cifar10_is_read_from_its_batches(tmp_path: Path) -> None:
    with pytest.raises(ImagesMistake, match="cifar-10-batches-py"):
        open_source(f"cifar10:{tmp_path}")


def test_pixels_are_normalized() -> None:
    image = Image.fromarray(np.full((4, 4, 3), 255, np.uint8))
    transform = Transform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pixels = transform.normalize(transform.cut()(image)[None])
    assert pixels.dtype == torch.float32
    assert pixels.unique().tolist() == [1.0]
