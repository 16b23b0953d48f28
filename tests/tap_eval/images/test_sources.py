"""Sources, splits that share no image, and what is said of those that cannot be used."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tap_agent.settings.read import ConfigMistake, read_settings
from tap_eval.images.decoding import Source
from tap_eval.images.images import Splits, Transform, room_in
from tap_eval.images.sources import digits, open_source, split
from tap_eval.mistake import ImagesMistake
from tests.tap_eval.images.pictures import png, write_folder, write_parquet


def given(transform: str) -> Transform | None:
    """As `--transform` takes it."""
    return read_settings(None, {"transform": transform}).networks[0].transform


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
    pixels = transform.normalize(transform.cut(3)(image)[None])
    assert pixels.dtype == torch.float32
    assert pixels.unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("spec", "takes", "channels", "transform", "said"),
    [
        ("folder", 1, 1, None, "made grey.*average of ImageNet's.*--transform mean=MEAN,std=STD"),
        ("folder", 1, 1, "resize=16,mean=0.5,std=0.5", "made grey, since the network takes one channel$"),
        ("folder", 3, 3, None, ""),
        ("folder", 4, 3, None, ""),
        ("folder", 3, 1, "channels=1", ""),
        ("digits", 1, 1, None, ""),
        ("digits", 3, 3, None, ""),
        ("digits", 1, 1, "resize=16", ""),
    ],
)
def test_images_have_the_channels_that_the_network_takes(
    tmp_path: Path, spec: str, takes: int, channels: int, transform: str | None, said: str
) -> None:
    if spec == "folder":
        spec = write_folder(tmp_path, {f"{'ab'[row % 2]}/{row}.png": png(row) for row in range(40)})
    splits = split(
        open_source(spec),
        calibration=None,
        seed=0,
        count=4,
        search=10,
        test=10,
        transform=given(transform) if transform else None,
        network=torch.nn.Conv2d(takes, 2, 3),
    )
    for images in (splits.search, splits.test, *splits.calibrations):
        assert images.pixels.shape[1] == channels
    grey = [note for note in splits.notes if "grey" in note]
    assert len(grey) == bool(said)
    assert all(re.search(said, note) for note in grey)


def test_grey_is_normalized_by_the_average_of_three() -> None:
    three = Transform(mean=(0.2, 0.4, 0.6), std=(0.1, 0.2, 0.3))
    one = Transform(mean=(0.4,), std=(0.2,))
    pixels = torch.full((1, 1, 2, 2), 51, dtype=torch.uint8)
    assert three.normalize(pixels).shape == (1, 1, 2, 2)
    torch.testing.assert_close(three.normalize(pixels), one.normalize(pixels))
    torch.testing.assert_close(one.normalize(pixels), torch.full((1, 1, 2, 2), -1.0))


@pytest.mark.parametrize(
    "transform",
    [
        Transform(),
        Transform(resize=256, crop=224, interpolation="bicubic"),
        Transform(channels=1, white=4095, mean=(0.5,), std=(0.25,)),
        Transform(mean=(0.1, 1 / 3, 0.3)),
    ],
)
def test_a_transform_can_be_given_back_as_it_is_told(transform: Transform) -> None:
    assert given(transform.text(resize="12")) == transform.model_copy(update={"resize": 12})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("channels=2", "channels"),
        ("mean=0.5/0.5", "one finite number or three"),
        ("mean=nan", "one finite number or three"),
        ("std=0", "above 0"),
        ("crop=0", "greater than or equal to 1"),
        ("white=-1", "greater than 0"),
    ],
)
def test_a_transform_that_makes_no_images_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigMistake, match=f"transform.*{said}"):
        given(text)


def test_calibration_images_are_cut_and_normalized_like_those_that_are_measured(tmp_path: Path) -> None:
    small = open_source(write_folder(tmp_path / "small", {f"{'ab'[row % 2]}/{row}.png": png(row) for row in range(9)}))
    files = {f"{'ab'[row % 2]}/{row}.png": png(row, (70, 70)) for row in range(9)}
    large = open_source(write_folder(tmp_path / "large", files))
    (calibration,) = split(large, calibration=small, seed=0, count=4).calibrations
    assert calibration.size == 224
    with pytest.raises(ImagesMistake, match=r"has images of 32 x 32 pixels, .*large of 70 x 70"):
        split(small, calibration=large, seed=0, count=4)


def test_a_source_that_is_spelled_in_another_way_is_the_same(parquet: str) -> None:
    path = Path(parquet.removeprefix("parquet:"))
    other = open_source(f"parquet:{path.parent}/../{path.parent.name}/{path.name}")
    same, twice = (split(open_source(parquet), calibration=by, seed=0, count=8) for by in (None, other))
    assert contents(twice) == contents(same)


def test_calibration_images_that_are_searched_or_tested_on_are_told(tmp_path: Path, parquet: str) -> None:
    copied = write_parquet(tmp_path / "copy.parquet", [png(i) for i in range(20)], [i % 2 for i in range(20)])
    splits = split(open_source(parquet), calibration=open_source(copied), seed=0, count=8, search=40, test=40)
    (note,) = [each for each in splits.notes if "to the pixel" in each]
    assert note.endswith("are among those that are searched on, 8 of 40 are the same to the pixel: give others")
    apart = write_parquet(tmp_path / "apart.parquet", [png(200 + i) for i in range(20)], [i % 2 for i in range(20)])
    splits = split(open_source(parquet), calibration=open_source(apart), seed=0, count=8)
    assert not [each for each in splits.notes if "to the pixel" in each]


def test_rows_that_are_sorted_by_class_are_told(tmp_path: Path, parquet: str) -> None:
    pictures = [png(i) for i in range(20)]
    rising, falling = (
        write_parquet(tmp_path / f"{by}.parquet", pictures, [(by + i // 10) % 2 for i in range(20)]) for by in (0, 1)
    )
    for source, told in ((rising, True), (falling, True), (parquet, False)):
        notes = split(open_source(source), calibration=None, seed=0, count=4).notes
        assert any("is sorted by class" in note for note in notes) == told


def test_sizes_that_are_advised_are_accepted() -> None:
    """Any number of images, of which any are asked for: what a refusal names is accepted when given back."""
    draw = random.Random(0)
    advised = {"search": 0, "count": 0}
    for _ in range(400):
        total, pool = draw.randint(1, 60), draw.choice([None, None, draw.randint(1, 20)])
        source = blank("some", total, range(min(pool, total)) if pool else None)
        calibration = blank("other", draw.randint(1, 40)) if draw.random() < 0.3 else None
        asked = {
            "count": draw.randint(1, 30),
            "draws": draw.randint(1, 5),
            "search": draw.choice([None, draw.randint(1, 70)]),
            "test": draw.choice([None, draw.randint(1, 70)]),
        }
        if count := re.search(r"--calibration-images (\d+)", refusal(source, calibration, asked)):
            asked["count"] = int(count[1])
            advised["count"] += 1
        assert "--calibration-images" not in refusal(source, calibration, asked)
        if sizes := re.search(r"--search (\d+) --test (\d+)", refusal(source, calibration, asked)):
            asked |= {"search": int(sizes[1]), "test": int(sizes[2])}
            advised["search"] += 1
        if refused := refusal(source, calibration, asked):
            assert "give more images" in refused
            assert total < 3 or (pool and total - pool < 2)
    assert min(advised.values()) > 50


def refusal(source: Source, calibration: Source | None, asked: dict[str, Any]) -> str:
    try:
        split(source, calibration=calibration, seed=0, **asked)
    except ImagesMistake as mistake:
        return str(mistake)
    return ""


def blank(name: str, rows: int, pool: range | None = None) -> Source:
    image = Image.new("L", (1, 1))
    return Source(name, ("a",), [0] * rows, lambda row: image.copy(), Transform(), pool)
