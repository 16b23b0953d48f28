"""The graph that langgraph.json names is there, drawn as designed, and opens nothing by being loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_graph_named_in_langgraph_json_loads_at_once_and_writes_nothing(tmp_path: Path) -> None:
    config = json.loads((ROOT / "langgraph.json").read_text())
    path, _, name = config["graphs"]["search"].partition(":")
    module = ".".join(Path(path).with_suffix("").parts)
    program = f"import json; from {module} import {name}; print(json.dumps({name}.get_graph().to_json()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    drawn = json.loads(done.stdout)
    edges = {(edge["source"], edge["target"]) for edge in drawn["edges"]}
    for template in ("initialization", "mutation", "crossover"):
        assert {("select", template), (template, "judge")} <= edges
    assert {("prepare", "seed"), ("judge", "select"), ("judge", "report")} <= edges
    assert list(tmp_path.iterdir()) == []


def test_langgraph_itself_accepts_the_file() -> None:
    from langgraph_cli.config import validate_config_file

    assert validate_config_file(ROOT / "langgraph.json")["graphs"].keys() == {"search"}
