"""Runs that are killed at random moments and resumed, beside one that nothing happened to.

    python -m benchmarks.kills --times 200
    python -m benchmarks.kills --times 20 --signal TERM --network digits

A run of the program itself, its proposals from a replay file, so that nothing waits for a model. It is killed at a
moment drawn evenly from the time that a whole run takes, and resumed; with every second one the resumed run is killed
once more. Then it goes on to its end. Every run begins with a cache that has the trained network and no measurement.

A row for each event after which runs were killed: how many, how many of them ended, and how many of those with the same
generations, candidates, best proxy and final table as the whole run. A run that differs is kept, and named.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from tap_agent.runs.folder import RunFolder
from tap_eval.networks.digits import load_digits_cnn

ROOT = Path(__file__).resolve().parents[1]
REPLAY = f"replay:{ROOT / 'tests' / 'replays' / 'digits.jsonl'}"
SETTINGS = [
    "--population", "3", "--generations", "2", "--search", "200", "--test", "200", "--draws", "1",
    "--baselines", "uniform", "--llm", REPLAY,
]  # fmt: skip
SAME = {"generations", "best", "table", "finalists", "candidates"}
_PAUSE = 0.01


def main() -> None:
    """Prints a Markdown table; exit status 1 where a run did not end, or ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--signal", choices=("KILL", "TERM", "HUP"), default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, default=Path("kills"), help="folder for runs that end otherwise")
    parser.add_argument("settings", nargs="*", help="in place of the program's settings here, after --")
    chosen = parser.parse_args()
    settings = chosen.settings or SETTINGS
    number, rng = signal.Signals[f"SIG{chosen.signal}"], random.Random(chosen.seed)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    with tempfile.TemporaryDirectory() as place:
        trial = Trial(Path(place), settings)
        expected, seconds = trial.whole()
        for time_ in range(chosen.times):
            after = trial.killed([rng.uniform(0, seconds) for _ in range(1 + time_ % 2)], number)
            found = trial.facts() if trial.ended() else None
            for event in after:
                counts[event][0] += 1
                counts[event][1] += found is not None
                counts[event][2] += found == expected
            if found != expected:
                chosen.keep.mkdir(parents=True, exist_ok=True)
                shutil.copytree(trial.run, chosen.keep / f"{time_}")
                print(f"differs: {chosen.keep / str(time_)}", file=sys.stderr)
    print("| killed after | times | went on to the end | as if nothing had happened |\n|---|---|---|---|")
    for event, row in sorted(counts.items()):
        print(f"| {event} | {' | '.join(map(str, row))} |")
    sums = [sum(row[place] for row in counts.values()) for place in range(3)]
    print(f"| all | {' | '.join(map(str, sums))} |")
    sys.exit(sums[0] != sums[2])


class Trial:
    """A run in a folder of its own, begun again and again."""

    def __init__(self, place: Path, settings: list[str]) -> None:
        self.run = place / "run"
        self._fresh, self._cache = place / "fresh", place / "cache"
        self._settings = settings
        load_digits_cnn(self._fresh)

    def whole(self) -> tuple[dict[str, Any], float]:
        """What a run comes to that nothing happens to, and the seconds from its first event to its end."""
        self._clear()
        process = self._start("run", *self._settings, "--out", str(self.run))
        self._wait(process)
        began = time.monotonic()
        if process.wait():
            raise RuntimeError(f"the run that nothing happens to ends with exit code {process.returncode}")
        return self.facts(), time.monotonic() - began

    def killed(self, moments: list[float], number: int) -> list[str]:
        """Begins a run, and sends it that signal so many seconds after it has begun, and after it has gone on.

        The last event before each; fewer than the moments where the run was faster.
        """
        self._clear()
        after: list[str] = []
        arguments = ["run", *self._settings, "--out", str(self.run)]
        for moment in moments:
            process = self._start(*arguments)
            self._wait(process)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
                process.wait()
                after.append(RunFolder(self.run).events()[-1]["event"])
            arguments = ["resume", str(self.run)]
        return after or ["nothing: it had ended"]

    def ended(self) -> bool:
        """Whether the run goes on to its end, and leaves nothing half-written."""
        done = self._start("resume", str(self.run)).wait()
        return done == 0 and RunFolder(self.run).has_ended() and not [*self.run.parent.rglob(".tap-of-*/*")]

    def facts(self) -> dict[str, Any]:
        """What the run has come to, without what a clock put there."""
        found: dict[str, Any] = RunFolder(self.run).finished().model_dump(mode="json", include=SAME)
        rows = [{**row, "cost": None} for row in found["table"]]
        return found | {"table": rows, "candidates": [{**each, "seconds": 0.0} for each in found["candidates"]]}

    def _clear(self) -> None:
        for folder in (self.run, self._cache):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._fresh, self._cache)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tap_agent", *arguments],
            env={**os.environ, "TAP_CACHE": str(self._cache), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # which nohup ignores
        )

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        """Until a process has written its first event, or has ended."""
        log = self.run / "events.jsonl"
        before = log.stat().st_size if log.exists() else 0
        while process.poll() is None and not (log.exists() and log.stat().st_size > before):
            time.sleep(_PAUSE)


if __name__ == "__main__":
    main()
