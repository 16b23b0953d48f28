"""What is in a file of weights: its tensors by name, read without running any code that the file brings."""

from __future__ import annotations

import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tap_eval.mistake import WeightsMistake

_COMMON = (
    "argparse.Namespace",
    "collections.defaultdict",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
"""what training scripts save beside weights; files of before torch 1.6 do not list what they name"""
_OPAQUE = ("numpy.", "functools.")
_STANDS_FOR = "stands for"
_DEEPEST = 6
_READING = threading.Lock()
_SAVE = "save network.state_dict() with torch.save"
_OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of Git LFS, the weights are elsewhere: fetch them with git lfs pull"),
    (b"<", "is a web page or XML: fetch the file itself"),
    (b"\x89HDF", f"is HDF5, as Keras writes it: {_SAVE}"),
    (b"\x93NUMPY", f"is an array of NumPy: {_SAVE}"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it first"),
    (b"{", "is JSON, perhaps an index of several files: give one file that holds all weights"),
)


@dataclass(frozen=True)
class Table:
    """Tensors by name, as a state dict holds them."""

    place: str
    """where in the file, as `state_dict`; "" is the file itself"""
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] | None = None
    """versions of modules by their names, which torch keeps beside a state dict"""


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights."""

    path: Path
    tables: tuple[Table, ...]
    contents: str
    """what it is where that is no state dict, as `a list`, else "" """


def read(path: Path) -> Checkpoint:
    """The file at `path`, of `torch.save` or safetensors; raises `WeightsMistake` that says what it is instead."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError as error:
        raise WeightsMistake(f"{path} does not exist: give the file of a state dict with --weights.") from error
    except IsADirectoryError as error:
        raise WeightsMistake(f"{path} is no file: give that of a state dict.") from error
    except OSError as error:
        raise WeightsMistake(f"{path} cannot be read ({error.strerror}): give the file of a state dict.") from error
    header = int.from_bytes(start[:8], "little")
    if (start[8:9] == b"{" and header < 2**32) or path.suffix == ".safetensors":
        try:
            return Checkpoint(path, (Table("", load_file(path)),), "")
        except SafetensorError as error:
            raise WeightsMistake(f"{path} cannot be read as safetensors ({error}): fetch or save it again.") from error
    if what := _other(path, start):
        raise WeightsMistake(f"{path} {what}.")
    loaded = _unpickled(path)
    tables = tuple(_tables(loaded))
    return Checkpoint(path, tables, _network(loaded) or ("" if tables else _kind(loaded)))


def _other(path: Path, start: bytes) -> str | None:
    """What a file is that `torch.save` did not write, with the next step."""
    if not start:
        return "is empty: fetch or save it again"
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            return "is cut off: fetch or save it again"
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names:
            return f"is a TorchScript archive, code and weights in one: {_SAVE}, of the network before torch.jit"
        if names & {"archive_format", "models/model.json"} or "" in names:
            return (
                f"is an archive of torch.export, code and weights in one: {_SAVE}, of the network before torch.export"
            )
        return None if "data.pkl" in names else f"is a zip archive, but not one of torch.save: {_SAVE}"
    return next((what for mark, what in _OTHERS if start.startswith(mark)), None)


def _unpickled(path: Path) -> Any:
    """What `torch.save` wrote, with something inert in place of all that is neither plain data nor a tensor."""
    names = set(_COMMON)
    try:
        if zipfile.is_zipfile(path):
            names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with _READING, torch.serialization.safe_globals([(_inert(name), name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a file of another kind makes of the unpickler is anybody's guess
        said = str(error).partition("\n\nCheck the documentation")[0].strip().split("\n")[-1]
        reason = said.rpartition("WeightsUnpickler error: ")[2].split(". ")[0]
        raise WeightsMistake(
            f"{path} cannot be read as a state dict ({type(error).__name__}: {reason}): save "
            "network.state_dict(), not the network or what else training had."
        ) from error


class _Opaque:
    """In place of an object that is not looked at."""

    def __new__(cls, *_: object, **__: object) -> _Opaque:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


@cache
def _inert(name: str) -> type:
    """In place of the class or function `name`: gives a mapping, with the attributes of what it would have been.

    torch lets no other type stand for subclasses of dict, as settings often are.
    """
    if name.startswith(_OPAQUE):
        return _Opaque

    def make(cls: type, *_: object, **__: object) -> OrderedDict[str, Any]:
        made: OrderedDict[str, Any] = OrderedDict()
        made.__dict__[_STANDS_FOR] = name
        return made

    return type(name, (), {"__new__": make})


def _tables(value: Any, place: str = "", depth: int = 0) -> Iterator[Table]:
    """Every mapping of names to tensors, from the outside in; an optimizer's are none of a network."""
    if depth > _DEEPEST or not isinstance(value, Mapping | list | tuple) or _is_optimizer(value):
        return
    inside = dict(value if isinstance(value, Mapping) else enumerate(value))
    if tensors := {key: each for key, each in inside.items() if isinstance(key, str) and isinstance(each, Tensor)}:
        yield Table(place, tensors, getattr(value, "_metadata", None))
    for key, each in inside.items():
        yield from _tables(each, f"{place}.{key}" if place else str(key), depth + 1)


def _network(value: Any) -> str | None:
    """The whole network that a file holds, as `torch.save(network, FILE)` leaves one."""
    for key, each in {"": value, **(value if isinstance(value, Mapping) else {})}.items():
        if "_modules" in getattr(each, "__dict__", {}):
            where = f" in its '{key}'" if key else ""
            return f"a whole network{where} ({vars(each).get(_STANDS_FOR)}), whose code is not run here"
    return None


def _kind(value: Any) -> str:
    """What a file holds that has no tensors by name."""
    if isinstance(value, Tensor):
        return "a single tensor"
    if not isinstance(value, Mapping) or not value:
        return f"a {type(value).__name__}"
    if any(_is_optimizer(each) for each in (value, *value.values())):
        return "the state of an optimizer"
    return f"a mapping of {', '.join(repr(key) for key in list(value)[:3])}{', …' if len(value) > 3 else ''}"


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()
