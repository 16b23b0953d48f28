"""Quantized networks as files, by the suffix of the file: what `apply --out` writes and a run leaves in its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tap_agent.runs.files import write
from tap_agent.runs.folder import RunMistake, check_file
from tap_agent.runs.result import ModelFile
from tap_agent.sessions.record import Chosen, about
from tap_eval.export import pt2, safetensors
from tap_eval.export.extra import Weights, onnx
from tap_eval.export.remaining import Remaining, remaining_of
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import ExportMistake
from tap_eval.storage import replacing

ALLOCATION = ".json"
"""ending of files of bits"""
_COMPARED = 64
"""images on which a file that is run is held against the network"""


@dataclass(frozen=True)
class How:
    """What is asked of a file beside its name."""

    onnx_weights: Weights = "packed"
    strict: bool = False
    """refused where anything of it is in float32"""


@dataclass(frozen=True)
class Written:
    """A file, and what is to be said of it."""

    path: Path
    notes: tuple[str, ...] = ()
    """of a network: what is in float32, and where a format has no place for few bits"""


def check(path: Path, how: How) -> None:
    """Raises a `Mistake` where no file can be written to `path`: before there is anything to write."""
    if path.suffix not in (ALLOCATION, *_WRITERS):
        given = f"'{path.name}' ends in {path.suffix}" if path.suffix else f"'{path.name}' has no ending"
        raise ExportMistake(
            f"{given}, which says nothing of what to write: give --out FILE.json for bits, or FILE"
            f"{' or FILE'.join(_WRITERS)} for a network."
        )
    if how.strict and path.suffix == ALLOCATION:
        raise ExportMistake(
            f"'{path.name}' is for bits, of which none are in float32: leave out --strict, or give --out "
            f"FILE{' or FILE'.join(_WRITERS)} for a network."
        )
    if path.suffix == ".onnx":
        onnx()
    check_file(path)


def check_strict(path: Path, benches: Sequence[Bench]) -> None:
    """Raises `ExportMistake` where something of a network is in float32 at any bits: before anything is measured.

    Which layers a runtime multiplies so is known when there is a file.
    """
    for name, bench in zip(file_names(path.stem, path.suffix, [each.name for each in benches]), benches, strict=True):
        remaining_of(bench.prepared, sums=bench.rounds_sums).refuse(name)


def _write_safetensors(path: Path, chosen: Chosen, how: How) -> Remaining:
    return safetensors.write(path, chosen.network, chosen.allocation, about(chosen), strict=how.strict)


def _write_pt2(path: Path, chosen: Chosen, how: How) -> Remaining:
    return pt2.write(path, chosen.network, chosen.allocation, _images(chosen), about(chosen), strict=how.strict)


def _write_onnx(path: Path, chosen: Chosen, how: How) -> Remaining:
    texts = {name: each if isinstance(each, str) else json.dumps(each) for name, each in about(chosen).items()}
    write = onnx().write
    images = _images(chosen)
    return write(path, chosen.network, chosen.allocation, images, texts, how.onnx_weights, strict=how.strict)


def _images(chosen: Chosen) -> Tensor:
    search = chosen.bench.splits.search
    return search.only(np.arange(min(_COMPARED, len(search)))).pixels


_WRITERS: dict[str, Callable[[Path, Chosen, How], Remaining]] = {
    ".safetensors": _write_safetensors,
    ".onnx": _write_onnx,
    ".pt2": _write_pt2,
}


def write_all(path: Path, networks: Sequence[Chosen], record: Callable[[], dict[str, Any]], how: How) -> list[Written]:
    """The files that `path` asks for: one of bits for all networks, or one a network. `record` makes that of bits.

    Raises a `Mistake` where they cannot be written.
    """
    try:
        if path.suffix == ALLOCATION:
            write(path, json.dumps(record(), indent=1))
            return [Written(path)]
        names = file_names(path.stem, path.suffix, [each.row.network for each in networks])
        return [_written(path.with_name(name), each, how) for name, each in zip(names, networks, strict=True)]
    except OSError as error:
        raise RunMistake(f"{path} cannot be written ({error}): give another --out.") from error


def model_file(folder: Path, name: str, chosen: Chosen) -> ModelFile:
    """Writes a network into the folder of a run, under a name that says by its ending how."""
    path = _written(folder / name, chosen, How()).path
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ModelFile(name=name, network=chosen.row.network, size_bytes=path.stat().st_size, sha256=digest)


def _written(path: Path, chosen: Chosen, how: How) -> Written:
    with replacing(path) as fresh:
        notes = _WRITERS[path.suffix](fresh, chosen, how).sentences()
        if path.suffix == ".pt2":
            size = chosen.bench.size(chosen.allocation).total
            notes.append(
                f"weights are int8, compressed, since such programs have no fewer bits: {fresh.stat().st_size:,} bytes "
                f"in all, where the packed network has {size:,}"
            )
    return Written(path, tuple(notes))


def file_names(stem: str, suffix: str, networks: Sequence[str]) -> list[str]:
    """A name for the file of each network, without its name where there is but one."""
    if len(networks) == 1:
        return [f"{stem}{suffix}"]
    words = [re.sub(r"[^\w.]+", "-", network).strip("-.") for network in networks]
    if len(set(words)) < len(words):
        words = [f"{place + 1}-{word}" for place, word in enumerate(words)]
    return [f"{stem}-{word}{suffix}" for word in words]
