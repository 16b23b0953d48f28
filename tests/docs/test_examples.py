"""Every example runs, and so does every cell of the notebook."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAST_LINE = {
    "apply_proxy": "quantized      ",
    "compare": "full precision ",
    "own_network": "these bits ",
    "quantize": "quantized ",
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty folder, the trained network at hand, and the threads as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAP_CACHE", str(cache))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.iterdir() if path.suffix == ".py"} == LAST_LINE.keys()
    assert [path.name for path in EXAMPLES.glob("*.ipynb")] == ["scores.ipynb"]


@pytest.mark.parametrize("name", LAST_LINE)
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(LAST_LINE[name])
    assert float(last.split("%")[0].split()[-1]) > 50


def test_the_cells_of_the_notebook_run_from_first_to_last(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((EXAMPLES / "scores.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert isinstance(names["figure"], go.Figure)
    assert len(names["figure"].data) == 3
    assert "these bits       9" in capsys.readouterr().out
