"""Which files of a folder are images, and which class is which output of the network."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from tap_eval.images.classes import data_of
from tap_eval.images.sources import open_source
from tap_eval.mistake import ImagesMistake
from tests.tap_eval.images.pictures import png, saved, write_folder, write_parquet


def test_a_folder_has_the_classes_and_images_of_torchvision(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.PNG", "b/deep/er/1.jpg", "a b/ü.png", "B/x.webp", "10/1.png", "2/[1].png"]
    source = open_source(write_folder(tmp_path, {name: png(1) for name in names}))
    folder = ImageFolder(str(tmp_path))
    assert list(source.classes) == folder.classes
    rows = range(len(source.labels))
    assert {(source.place(row), source.labels[row]) for row in rows} == {
        (os.path.relpath(path, tmp_path), label) for path, label in folder.samples
    }


def test_what_is_hidden_is_no_class_and_no_image_and_the_rest_is_named(tmp_path: Path) -> None:
    hidden = [".git/a.png", ".ipynb_checkpoints/b.png", "a/.ipynb_checkpoints/1.png", "a/._1.png", ".DS_Store"]
    seen = write_folder(tmp_path, {name: png(1) for name in [*hidden, "a/1.png", "b/1.png"]})
    assert open_source(seen).classes == ("a", "b")
    assert len(open_source(seen).labels) == 2
    assert open_source(seen).notes == ()
    write_folder(tmp_path, {"a/1.gif": b"", "a/labels.txt": b"", "flat.png": png(1)})
    (note,) = open_source(seen).notes
    assert "3 of 5 files left out, first a/1.gif" in note


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    spec = write_folder(tmp_path / "all", {"a/1.png": png(1), "b/1.png": png(2)})
    write_folder(tmp_path / "elsewhere", {"2.png": png(3)})
    for link, target in {"a/self": ".", "a/up": "..", "b/there": tmp_path / "elsewhere", "b/gone.png": "none"}.items():
        (tmp_path / "all" / link).symlink_to(target)
    source = open_source(spec)
    assert sorted(map(source.place, range(4))) == ["a/1.png", "b/1.png", "b/gone.png", "b/there/2.png"]
    assert len(source.labels) == 4


def test_a_name_that_cannot_be_shown_is_escaped(tmp_path: Path) -> None:
    for name in (os.fsdecode(b"caf\xe9"), "new\nline", "\x1b[31mred"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "\x07.png").write_bytes(png(1))
    source = open_source(f"imagefolder:{tmp_path}")
    said = source.order + source.place(0)
    assert said.isprintable()
    assert said.encode()
    assert "caf\\udce9" in said


def test_data_is_called_what_it_calls_itself_and_never_by_its_file(tmp_path: Path) -> None:
    ten = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    named = write_parquet(tmp_path / "mine.parquet", [png(0)], [0], ten)
    other = write_parquet(tmp_path / "other.parquet", [png(0)], [0])
    told = write_parquet(tmp_path / "told.parquet", [png(0)], [0], info={"dataset_name": "flowers"})
    folder = write_folder(tmp_path / "cifar", {f"{name}/0.png": png(0) for name in ten})
    assert [open_source(spec).data for spec in (named, other, told, folder, "digits")] == [
        "CIFAR-10", "images", "flowers", "CIFAR-10", "digits",
    ]  # fmt: skip
    assert data_of([f"n{number:08d}" for number in range(1000)]) == "ImageNet"
    assert data_of(ten[:9]) == "images"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a/1.png": png(1), "b/notes.txt": b""}, "no images in its class folders b \\(1\\).*--classes FILE"),
        ({"a/1.png": png(1), "b/.hidden.png": png(1)}, "no images in its class folders b"),
        ({"1.png": png(1)}, "no images in class folders; give a folder of DIR/CLASS/IMAGE"),
    ],
)
def test_a_folder_without_classes_or_images_is_refused(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    with pytest.raises(ImagesMistake, match=said):
        open_source(write_folder(tmp_path, files))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["ant", "bee"], "class 0 is ant, 1 is bee$"),
        (["0", "1", "2"], "^$"),
        (["1", "2", "10"], "class 0 is 1, 1 is 10, 2 is 2; they are sorted as text, in which 10 comes before 2"),
        (["n2", "n10", "n3"], "in which n10 comes before n2.*--classes FILE"),
        (["01", "02", "10"], "class 0 is 01, 1 is 02, 2 is 10$"),
        ([f"n{number:08}" for number in range(7)], "class 0 is n00000000, .*, 2 is n00000002, …, 6 is n00000006$"),
    ],
)
def test_the_order_of_classes_is_shown(tmp_path: Path, names: list[str], said: str) -> None:
    assert re.search(said, open_source(write_folder(tmp_path, {f"{name}/1.png": png(1) for name in names})).order)


FILES = {
    "lines.txt": "2\n10\n1\n",
    "windows.txt": "\ufeff2\r\n10\r\n1\r\n",
    "synsets.txt": "2 two, the second\n10 ten\n1 one\n",
    "list.json": json.dumps(["2", "10", "1"]),
    "class_index.json": json.dumps({"0": ["2", "two"], "2": ["1", "one"], "1": ["10", "ten"]}),
    "words.json": json.dumps({"0": ["n02", "2"], "1": ["n10", "10"], "2": ["n01", "1"]}),
    "class_to_idx.json": json.dumps({"1": 2, "2": 0, "10": 1}),
}


@pytest.mark.parametrize("where", ["folder", "parquet"])
@pytest.mark.parametrize("file", FILES)
def test_a_file_gives_the_order_of_classes(tmp_path: Path, file: str, where: str) -> None:
    (tmp_path / file).write_text(FILES[file])
    names = ["1", "10", "2"]
    if where == "parquet":
        spec = write_parquet(tmp_path / "some.parquet", [png(1)] * 3, [0, 1, 2], names)
    else:
        spec = write_folder(tmp_path / "images", {f"{name}/{name}.png": png(1) for name in names})
    before, source = open_source(spec), open_source(spec, tmp_path / file)
    labels = {before.classes[old]: new for old, new in zip(before.labels, source.labels, strict=True)}
    assert labels == {"2": 0, "10": 1, "1": 2}
    assert "sorted as text" in before.order
    assert "sorted as text" not in source.order
    assert source.notes == ()


def test_a_file_may_name_classes_without_images(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("wasp\nant\nbee\n")
    source = open_source(write_folder(tmp_path / "images", {"bee/1.png": png(1), "ant/1.png": png(1)}),
                         tmp_path / "all.txt")  # fmt: skip
    assert source.classes == ("wasp", "ant", "bee")
    assert sorted(source.labels) == [1, 2]
    assert "no images of wasp (1)" in source.notes[0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("absent.txt", None, "cannot be read as names of classes"),
        ("few.txt", "ant\nwasp", "does not name the classes bee \\(1\\) of .*, but ant, wasp \\(2\\)"),
        ("twice.txt", "ant\nbee\nant", "more than one class called ant"),
        ("gap.txt", "ant\n\nbee", "no name in line 2"),
        ("empty.txt", "\n", "is empty"),
        ("bad.json", "{", "cannot be read as names of classes"),
        ("number.json", "3", "holds no names"),
        ("holes.json", '{"0": "ant", "2": "bee"}', "do not count from 0"),
        ("latin.txt", b"\xe9", "cannot be read as names of classes"),
    ],
)
def test_a_file_that_does_not_name_the_classes_is_refused(
    tmp_path: Path, name: str, text: str | bytes | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    spec = write_folder(tmp_path / "images", {"bee/1.png": png(1), "ant/1.png": saved(Image.new("L", (4, 4)))})
    with pytest.raises(ImagesMistake, match=said):
        open_source(spec, tmp_path / name)
