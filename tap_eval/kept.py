"""Tensors in files of a cache: each named by what it depends on, sealed, and made anew where it is not whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tap_eval.sealed import UPDATE, VERSION, damaged, digest, newer
from tap_eval.storage import CACHE, replacing

_SEAL = "sealed"


class Kept:
    """Tensors in files, each named by its content; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def recall(self, name: str) -> dict[str, Tensor] | None:
        """What is kept under `name`; None where nothing is, or something that is not what was written.

        What was written before there were seals is taken as it is. Raises `DamagedMistake` for what a newer version of
        the program wrote, so that nothing is written over it.
        """
        path = self._path(name)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118 it is no mapping
                about = file.metadata()
        except (SafetensorError, OSError):  # cut off, or damaged
            return None
        if not about:
            return tensors
        mark = about.get(_SEAL, "")
        version = mark.partition(" ")[0]
        if version.isdecimal() and int(version) > VERSION:
            raise damaged(path, newer(int(version)), UPDATE)
        return tensors if mark == _mark(name, tensors) else None

    def holds(self, name: str) -> bool:
        """Whether something is kept under `name`, which may yet turn out to be damaged."""
        path = self._path(name)
        return path is not None and path.exists()

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes them, whole or not at all; raises `StorageMistake`."""
        path = self._path(name)
        if path is None:
            return
        plain = {each: tensor.cpu().contiguous() for each, tensor in tensors.items()}
        with replacing(path, CACHE) as fresh:
            save_file(plain, fresh, {_SEAL: _mark(name, plain)})

    def _path(self, name: str) -> Path | None:
        return self.folder and self.folder / name[:2] / f"{name}.safetensors"


def _mark(name: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the tensors of a file and of its name, so that none stands for another."""
    parts = [name.encode()]
    for each, tensor in sorted(tensors.items()):
        parts += [f"{each} {tensor.dtype} {list(tensor.shape)} ".encode()]
        parts += [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()]
    return f"{VERSION} {digest(b''.join(parts))}"
