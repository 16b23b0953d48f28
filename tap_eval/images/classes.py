"""The order of classes: what label is what class, shown to the user and taken from a file."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tap_eval.mistake import ImagesMistake

UNNAMED = "images"
"""data that does not say what it is called"""
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IMAGENET = ("tench", "goldfish", "great white shark")
"""the first of its thousand classes"""
_FORMS = "names one a line, a JSON list of them, or a JSON object of ImageNet's class_index form"


def plain(text: object) -> str:
    """What can be shown on a terminal: characters that are not to be printed are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def few(names: Sequence[str]) -> str:
    """`a, b, c, … (12)`"""
    return f"{', '.join(map(plain, names[:3]))}{', …' if len(names) > 3 else ''} ({len(names):,})"


def order(name: str, classes: Sequence[str], given: bool) -> str:
    """A sentence on what label is what class, or nothing where the classes are called 0, 1, 2 and so on.

    Unless the order was `given`, names that count, but not in the order of the numbers (1, 10, 2),
    are pointed at.
    """
    if list(classes) == [str(label) for label in range(len(classes))]:
        return ""
    shown = [f"{label} is {plain(each)}" for label, each in enumerate(classes)]
    listed = ", ".join(shown if len(shown) <= 5 else [*shown[:3], "…", shown[-1]])
    note = f"{name}: class {listed}"
    counted = sorted(classes, key=_natural)
    if not given and list(classes) == sorted(classes) != counted:
        first = next(label for label, each in enumerate(counted) if each != classes[label])
        note += (
            f"; they are sorted as text, in which {plain(classes[first])} comes before {plain(counted[first])}: if the "
            "network's classes follow the numbers, name them in that order in --classes FILE"
        )
    return note


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def data_of(classes: Sequence[str]) -> str:
    """What the data is called whose `classes`, in any order, are those of CIFAR-10 or ImageNet; else `UNNAMED`."""
    names = {name.replace("_", " ").casefold() for name in classes}
    if names == set(_CIFAR10):
        return "CIFAR-10"
    if len(classes) == 1000 and (names.issuperset(_IMAGENET) or all(re.fullmatch(r"n\d{8}", each) for each in names)):
        return "ImageNet"
    return UNNAMED


def read_classes(path: Path) -> list[tuple[str, ...]]:
    """What each class is called, in the order of the network's outputs; several names are names of one class.

    A text file has a name a line, and the first word is one too, as in ImageNet's `n01440764
    tench`. JSON is a list of names; an object of numbers to names, or to lists of them, as in
    ImageNet's class_index; or an object of names to numbers. Raises `ImagesMistake`.
    """
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix.lower() == ".json":
            return _from_json(json.loads(text))
    except (OSError, ValueError, TypeError) as error:
        raise ImagesMistake(f"{path} cannot be read as names of classes ({error}): give {_FORMS}.") from error
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if not all(lines):
        where = "is empty" if lines == [""] else f"has no name in line {lines.index('') + 1}"
        raise ImagesMistake(f"{path} {where}: give {_FORMS}.")
    return [(line, line.split()[0]) for line in lines]


def _from_json(content: Any) -> list[tuple[str, ...]]:
    """Raises `ValueError` or `TypeError` when it is of no known form."""
    if isinstance(content, dict):
        if all(type(label) is int for label in content.values()):
            content = {label: name for name, label in content.items()}
        numbered = {int(label): names for label, names in content.items()}
        if sorted(numbered) != list(range(len(content))):
            raise ValueError("its numbers do not count from 0")
        content = [numbered[label] for label in range(len(numbered))]
    if not isinstance(content, list) or not content:
        raise TypeError("it holds no names")
    classes = [tuple(map(str, each)) if isinstance(each, list) else (str(each),) for each in content]
    if not all(classes):
        raise ValueError("a class has no name")
    return classes


def labels_in(path: Path, source: str, classes: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Names of all classes in the order of the file at `path`, and for each of `classes` its label there.

    Raises `ImagesMistake` when the file cannot be read, lacks a class of `source`, or has it twice.
    """
    names = read_classes(path)
    kinds = [[_same(each[min(kind, len(each) - 1)]) for each in names] for kind in range(max(map(len, names)))]
    wanted = [_same(name) for name in classes]
    kind = max(kinds, key=lambda names: len(set(wanted).intersection(names)))
    if missing := [name for name, same in zip(classes, wanted, strict=True) if same not in kind]:
        raise ImagesMistake(
            f"{path} does not name the classes {few(missing)} of {source}, but {few([each[0] for each in names])}: "
            "give the names that the source has, in the order of the network's outputs."
        )
    times = Counter(kind)
    if twice := [name for name, same in zip(classes, wanted, strict=True) if times[same] > 1]:
        raise ImagesMistake(f"{path} has more than one class called {few(twice)}: give each class of {source} once.")
    labels = {same: label for label, same in enumerate(kind)}
    return tuple(each[0] for each in names), [labels[same] for same in wanted]


def _same(name: str) -> str:
    """Equal for names that look equal."""
    return unicodedata.normalize("NFC", name)
