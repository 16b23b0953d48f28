"""Applying a proxy that was found before: no search, one pass from scores to accuracy (the paper's TAP-C)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tap_agent.runs.folder import RunFolder
from tap_agent.runs.result import Row
from tap_agent.sessions.final_table import final_table
from tap_agent.sessions.outcome import best_record
from tap_agent.sessions.resources import Resources
from tap_eval.mistake import Mistake
from tap_eval.proxies.proxy import Rejection
from tools.evaluation import score
from tools.toolbox import layer_table


class ProxyMistake(Mistake):
    """A proxy that cannot be read, or that does not run."""

    kind = "proxy"


@dataclass(frozen=True)
class Found:
    """A proxy, where it came from, and the config of its run if that is known."""

    origin: str
    thought: str
    code: str
    config: Path | None


@dataclass(frozen=True)
class Applied:
    """What came of it: the final table, the allocation, seconds of each step, and the text of an allocation file."""

    rows: list[Row]
    layers: list[str]
    """scores and bits of the layers, Markdown, one table a network"""
    scoring_seconds: float
    allocation_seconds: float
    record: str


def read_proxy(path: Path) -> Found:
    """The proxy in a file, or the best of a run; raises `ProxyMistake`, and `RunMistake` of a run without a result."""
    if path.is_dir():
        folder = RunFolder(path)
        result = folder.finished()
        best = result.candidate(result.best)
        return Found(f"{folder.name}/{best.name}", best.thought, best.code, path / "config.yaml")
    try:
        code = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ProxyMistake(f"{path} is no proxy and no run: give a .py file or a run's folder.") from error
    run = path.parent.parent / "config.yaml"
    return Found(str(path), "", code, run if path.parent.name == "proxies" and run.is_file() else None)


def apply(found: Found, resources: Resources, tell: Callable[[str], None]) -> Applied:
    """Scores, allocates, quantizes and measures on the test split; raises `ProxyMistake` when the proxy fails."""
    scored = score(found.code, resources.benches, resources.sandbox)
    if isinstance(scored, Rejection):
        raise ProxyMistake(f"{found.origin} fails ({scored.failure}): {scored.message}")
    rows: list[Row] = []
    for bench, allocation in zip(resources.benches, scored.allocations, strict=True):
        tell(bench.name)
        rows += final_table(bench, found.origin, allocation, resources.settings.seed, lambda: None, search=False)
    provenance = {"proxy": found.origin, "at": time.strftime("%Y-%m-%d"), "seed": resources.settings.seed}
    record = best_record(found.thought, found.code, rows, resources.benches, provenance)
    tables = [layer_table(bench, scored, place) for place, bench in enumerate(resources.benches)]
    return Applied(rows, tables, scored.scoring_seconds, scored.allocation_seconds, json.dumps(record, indent=1))
