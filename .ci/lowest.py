"""Prints the least release of each dependency that pyproject.toml admits, as constraints for pip."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
_DEPENDENCY = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)(?:,<[\w.]+)?")


def lowest() -> dict[str, str]:
    """The least release by name; raises `ValueError` for a dependency without one, or with two."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = project["project"]["optional-dependencies"].values()
    groups = project["dependency-groups"].values()
    found: dict[str, str] = {}
    for dependency in [each for group in (project["project"]["dependencies"], *optional, *groups) for each in group]:
        parts = _DEPENDENCY.fullmatch(dependency)
        if parts is None:
            raise ValueError(f"{dependency!r} in pyproject.toml has no least release, as in `name>=1.2`.")
        name, version = parts.groups()
        if found.setdefault(name, version) != version:
            raise ValueError(f"{name} has two least releases in pyproject.toml, {found[name]} and {version}.")
    return found


if __name__ == "__main__":
    print("".join(f"{name}=={version}\n" for name, version in lowest().items()), end="")
