"""A run's folder."""

from __future__ import annotations

import json
from pathlib import Path

from tap_agent.runs.folder import RunFolder
from tap_agent.settings.model import Settings


def test_the_time_of_a_run_is_that_of_its_sessions(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Settings())
    days = {"started": "01T10:00:00", "finished": "01T10:00:10", "refined": "04T10:00:00", "resumed": "05T10:00:00",
            "stopped": "05T10:00:05", "forked": "09T10:00:00"}  # fmt: skip
    lines = [json.dumps({"event": event, "at": f"2026-01-{day}+00:00"}) for event, day in days.items()]
    (folder.path / "events.jsonl").write_text("\n".join(lines))
    assert folder.seconds() == 15
