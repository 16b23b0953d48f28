"""Temporary folders: gone with their process, or with the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tap_eval.scratch import scratch
from tap_eval.storage import replacing

HOLD = """
from tap_eval.scratch import scratch
with scratch() as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    input()
"""


def holder(temporary: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a temporary folder until it is told a line, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env={"TMPDIR": str(temporary)},
    )  # fmt: skip
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_what_a_killed_process_has_left_goes_with_the_next_start_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        process, folder = holder(tmp_path)
        process.send_signal(number)
        process.wait()
        killed.append(folder)
    assert killed[-1].joinpath("file").exists()
    alive, held = holder(tmp_path)
    (tmp_path / "tap-sandbox-of-others").mkdir()
    (tmp_path / "tap-scratch-link").symlink_to(tmp_path / "tap-sandbox-of-others")
    with scratch() as own:
        assert own.parent == tmp_path
        assert not any(folder.exists() for folder in killed)
        assert held.joinpath("file").exists()
        with scratch() as other:
            assert own.exists()
            assert own != other
    alive.communicate("\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tap-sandbox-of-others", "tap-scratch-link"]


REPLACE = """
from pathlib import Path
from tap_eval.storage import replacing
with replacing(Path("file")) as fresh:
    fresh.write_text("half")
    print(fresh.resolve(), flush=True)
    input()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such locks")
def test_what_was_half_written_when_its_process_was_killed_goes_when_another_writes_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    command, environment = [sys.executable, "-c", REPLACE], {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    assert process.stdout
    half = Path(process.stdout.readline().strip())
    with replacing(tmp_path / "other") as fresh:
        fresh.write_text("other")
    assert half.exists()
    process.kill()
    process.wait()
    assert (tmp_path / "file").read_text() == "before"
    subprocess.run(command, cwd=tmp_path, env=environment, input="\n", text=True, check=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "half", "other": "other"}
