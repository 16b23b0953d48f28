"""The program as others install it: a wheel, in an environment without this checkout, run from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.tap_agent.program import REPLAYED, SMALL

ROOT = Path(__file__).parents[1]
PACKAGES = ("tap_agent", "graphs", "agents", "tools", "prompts", "tap_eval")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone, which finds the dependencies where this one has them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, source)
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source], folder)
    (wheel,) = folder.glob("tap_agent-*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
    _run([sys.executable, "-m", "pip", "--python", python, *install], folder)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not read
    (folder / "env" / "bin" / "monty").symlink_to(Path(sysconfig.get_path("scripts")) / "monty")
    return folder / "env"


def _run(command: list[object], folder: Path, **variables: str) -> str:
    beside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        list(map(str, command)), cwd=folder, env=beside | variables, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_package_is_the_wheels(environment: Path, tmp_path: Path) -> None:
    script = f"import {', '.join(PACKAGES)}; print(*({', '.join(f'{each}.__file__' for each in PACKAGES)},), sep='\\n')"
    files = "assert (files('tap_agent.tables') / 'plans' / 'ablation' / 'alpha.yaml').is_file()"
    data = "from importlib.resources import files; from tap_agent.tables.cited import cited; cited('4')"
    script = f"{data}; {files}; {script}"
    found = _run([environment / "bin" / "python", "-c", script], tmp_path).split()
    assert len(found) == len(PACKAGES)
    assert all(Path(each).is_relative_to(environment) for each in found)


def test_a_search_runs_from_another_folder(environment: Path, tmp_path: Path, cache: Path) -> None:
    shutil.copy(REPLAYED, tmp_path / "said.jsonl")
    arguments = ["run", *SMALL, "--draws", "1", "--llm", "replay:said.jsonl", "--out", "found"]
    _run([environment / "bin" / "tap-agent", *arguments], tmp_path, TAP_CACHE=str(cache))
    assert (tmp_path / "found" / "best.json").exists()
    assert (tmp_path / "found" / "report.html").exists()


def test_the_library_needs_no_checkout(environment: Path, tmp_path: Path) -> None:
    script = """
import torch
from tap_eval import quantize
network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 10))
print(quantize(network.eval(), torch.rand(16, 1, 8, 8), "3bit").size.total)
"""
    assert int(_run([environment / "bin" / "python", "-c", script], tmp_path)) > 0
