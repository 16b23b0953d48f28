"""A folder of classes: which files are images, and of which class."""

from __future__ import annotations

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from tap_eval.images.classes import few, plain
from tap_eval.mistake import ImagesMistake

ENDINGS = ", ".join(IMG_EXTENSIONS)


def read_folder(root: Path) -> tuple[tuple[str, ...], list[tuple[str, int]], list[str]]:
    """Names of the class folders in `root`, each image below them with its class, and the files that are left out.

    Images are paths from `root`. All is in the order of torchvision's `ImageFolder`, without what
    is hidden. In a class a folder is read once, so links may lead back. Raises `ImagesMistake`
    when there are no class folders, one of them has no images, or one cannot be read.
    """
    try:
        folders = sorted(path.name for path in root.iterdir() if path.is_dir() and _shown(path.name))
        beside = [path.name for path in root.iterdir() if _shown(path.name) and not path.is_dir()]
        files = [(path, label) for label, name in enumerate(folders) for path in _files(root, name)]
    except OSError as error:
        raise ImagesMistake(f"{plain(root)} cannot be read ({error}); give a folder of DIR/CLASS/IMAGE.") from error
    if not folders:
        raise ImagesMistake(f"{plain(root)} has no images in class folders; give a folder of DIR/CLASS/IMAGE.")
    images = [(path, label) for path, label in files if _is_image(path)]
    others = [path for path, _ in files if not _is_image(path)] + sorted(filter(_is_image, beside))
    filled = {label for _, label in images}
    if empty := [name for label, name in enumerate(folders) if label not in filled]:
        raise ImagesMistake(
            f"{plain(root)} has no images in its class folders {few(empty)}: put some there ({ENDINGS}), or remove the "
            "folders and name every class of the network in --classes FILE."
        )
    return tuple(folders), images, others


def _files(root: Path, folder: str) -> list[str]:
    """All that is not hidden in `folder` and below, as paths from `root`; raises `OSError`."""
    read = {_identity(root)}
    found: list[tuple[str, str]] = []

    def unread(place: Path) -> bool:
        before = len(read)
        read.add(_identity(place))
        return len(read) > before

    if unread(root / folder):
        for place, folders, files in os.walk(root / folder, onerror=_raise, followlinks=True):
            folders[:] = [name for name in sorted(folders) if _shown(name) and unread(Path(place, name))]
            found += [(place, name) for name in files if _shown(name)]
    return [f"{place}{os.sep}{name}".removeprefix(f"{root}{os.sep}") for place, name in sorted(found)]


def _raise(error: OSError) -> None:
    raise error


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _shown(name: str) -> bool:
    return not name.startswith(".")


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMG_EXTENSIONS)
