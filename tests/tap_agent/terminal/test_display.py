"""What a search shows while it runs: in a pseudo-terminal, and where its output is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphs.state import TEMPLATES
from tap_agent.exit import Exit
from tap_agent.terminal.display import event_line
from tests.agents.scripted import Answer, ChatServer, proposal, refusal
from tests.graphs.test_search import script
from tests.tap_agent.program import tap

RUN = ["run", "--population", "5", "--generations", "1", "--search", "400", "--test", "100", "--draws", "1"]
CONTROLS = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")
ROW = r"{name} +0\.\d{{4}} +\d+\.\d +\d\.\d{{3}} +\d+\.\d +\d+"


def with_deaths(request: dict[str, Any]) -> Answer:
    """The usual script, but for three seeds in five: code that fails, and code that others propose too.

    Of a model that has no temperature.
    """
    if "temperature" in request:
        return refusal(400, "temperature is not supported")
    kind = request["seed"] // 3 % 5
    if kind == 0:
        return proposal("Bad.", "def sensitivity(layers, task):\n    return [1 / 0 for x in layers]\n")
    if kind < 3:
        return proposal("Same.", "def sensitivity(layers, task):\n    return [x['depth'] for x in layers]\n")
    return script(request)


@pytest.fixture
def url() -> Iterator[str]:
    with ChatServer(with_deaths) as server:
        yield server.url


def in_terminal(arguments: list[str], folder: Path, cache: Path, columns: int, until: str = "report: ") -> str:
    """What the program writes to a terminal of so many columns, controls taken out; killed once it wrote `until`."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TAP_CACHE": str(cache), "TERM": "xterm-256color"}
    environment.pop("COLUMNS", None)
    running = subprocess.Popen(
        [sys.executable, "-m", "tap_agent", *arguments], cwd=folder, env=environment, stdin=follower, stdout=follower,
        stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    written = b""
    while until.encode() not in written:
        try:
            written += os.read(leader, 65536)
        except OSError:  # the end of a terminal that nobody writes to
            break
    running.send_signal(signal.SIGKILL)
    running.wait()
    os.close(leader)
    return CONTROLS.sub(b"", written).decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def test_a_terminal_shows_a_table_that_fills_and_a_resumed_run_shows_what_there_was(
    tmp_path: Path, cache: Path, url: str
) -> None:
    arguments = [*RUN, "--llm", "scripted", "--base-url", url, "--racing", "0.2", "--out", "run"]
    first = in_terminal(arguments, tmp_path, cache, 80, until="generation 1 of 1: proposing")
    assert [line for line in first.splitlines() if len(line) > 80] == []
    assert re.search(r"generation +template +candidate +fitness +accuracy +KL +seconds +tokens", first)
    assert re.search(r"0 +initialization +" + ROW.format(name="p000"), first)  # judged
    assert re.search(r"generation 0: fitness best 0\.\d{4}, mean 0\.\d{4}; died: \d (duplicate|error)", first)
    assert first.count("scripted refuses temperature, which is left out from now on.") == 1
    again = in_terminal(["resume", "run"], tmp_path, cache, 120)
    assert [line for line in again.splitlines() if len(line) > 120] == []
    assert again.index("generation 0: fitness best") < again.index("generation 1: fitness")
    assert re.search(r"duplicate: it gives the same", again)
    assert "Deserializing" not in again
    assert "Top-1 accuracy" in again


def test_without_a_terminal_each_event_is_a_plain_line(
    tmp_path: Path, cache: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAP_CACHE", str(cache))
    arguments = [*RUN, "--llm", "scripted", "--base-url", url, "--racing", "0.2", "--seed", "1", "--out", "run"]
    assert tap(*arguments) == Exit.OK
    printed = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in printed)
    lines = printed.splitlines()
    begun = ["started llm=scripted seed=1", "preparing network=digits layers=10", "prepared network=digits"]
    assert [line.partition(" notes=")[0] for line in lines[:3]] == begun
    assert printed.count('notes="scripted refuses temperature, which is left out from now on."') == 1
    proposed = [line for line in lines if line.startswith("proposed name=p00")]
    assert len(proposed) == 10
    assert sum("failure=" in line for line in proposed) >= 1
    assert any(re.search(r'failure=error message="line 2: ZeroDivisionError', line) for line in proposed)
    judged = [line for line in lines if line.startswith("judged ")]
    assert len(judged) == 10
    alive = re.compile(
        r"judged name=p\d{3} generation=\d template=\w+ seconds=\d+\.\d{4} tokens=\d+ fitness=-?\d\.\d{4} "
        r"accuracy=0\.\d{4} kl=\d\.\d{4}( dropped=yes)?"
    )
    assert sum(bool(alive.fullmatch(line)) for line in judged) == sum("failure=" not in line for line in judged)
    generations = [line for line in lines if line.startswith("generation ")]
    assert [line.split()[1] for line in generations] == ["index=0", "index=1"]
    assert any(re.fullmatch(r"finished best=p\d{3}", line) for line in lines)


def test_a_line_keeps_control_characters_and_spaces_in_quotes() -> None:
    event = {"event": "judged", "name": "p001", "failure": "error", "message": "a\x1b[2J\nb", "fitness": None}
    assert event_line(event) == 'judged name=p001 failure=error message="a\\u001b[2J\\nb"'
    shares = dict.fromkeys(TEMPLATES, 1 / 3)
    event = {"event": "generation", "index": 0, "best": None, "mean": None, "probabilities": shares, "failures": {}}
    assert event_line(event) == "generation index=0 initialization=0.3333 mutation=0.3333 crossover=0.3333"
