"""torchvision's published weights: which of them a file is, how their network is built, what they want of images."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torchvision import models

from tap_eval.images.images import Transform
from tap_eval.mistake import WeightsMistake


def entries(network: str) -> list[Any]:
    """The weights that torchvision publishes for a classifier of its own."""
    return list(models.get_model_weights(network))


def named(network: str, entry: str) -> Any:
    """The entry of that name, as IMAGENET1K_V1 or DEFAULT; raises `WeightsMistake`."""
    known = models.get_model_weights(network)
    try:
        return known[entry.rpartition(".")[2]]
    except KeyError as error:
        names = ", ".join(each.name for each in known)
        raise WeightsMistake(f"torchvision publishes no weights '{entry}' of {network}: there are {names}.") from error


def place(entry: Any) -> Path:
    """Where the file of an entry lies, or goes: torch's own folder of such files."""
    return Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]


def fetched(entry: Any) -> Path:
    """The file of an entry, which is downloaded if it is not in its place.

    Raises `OSError`, and `RuntimeError` where what came has not the hash in its name.
    """
    path = place(entry)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(entry.url, str(path), hash_prefix=_hash(entry))
    return path


def recognised(path: Path, known: Iterable[Any]) -> Any:
    """The entry whose file it is, by the hash that torchvision gives it in its name, or else by its content."""
    hashes = {start: each for each in known if (start := _hash(each))}
    for start, each in hashes.items():
        if start in path.name:
            return each
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return next((each for start, each in hashes.items() if content.startswith(start)), None)


def _hash(entry: Any) -> str | None:
    """The start of its file's SHA-256."""
    found = re.search(r"-([0-9a-f]{8,})\.\w+$", entry.url)
    return found and found[1]


def arguments(network: str, entry: Any, auxiliary: bool) -> dict[str, Any]:
    """With what torchvision builds a network for weights of an entry, or of nobody's.

    `auxiliary` is whether the weights have auxiliary heads, which some networks can do without.
    """
    builder = models.get_model_builder(network)
    accepted = inspect.signature(inspect.signature(builder).return_annotation).parameters
    given: dict[str, Any] = {"init_weights": False, "aux_logits": auxiliary}
    if entry is not None:
        meta = entry.meta
        given |= {"transform_input": True, "input_size": meta["min_size"], "image_size": meta["min_size"][0]}
        given |= {"num_classes": len(meta["categories"])} if meta["categories"] else {}
    return {name: value for name, value in given.items() if name in accepted}


def is_silent_on_input(network: str) -> bool:
    """Whether the network may normalize its input anew, which weights do not tell."""
    builder = models.get_model_builder(network)
    return "transform_input" in inspect.signature(inspect.signature(builder).return_annotation).parameters


def transform(entry: Any) -> Transform:
    """What the weights of an entry want of images."""
    preset = entry.transforms()
    return Transform(
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
