"""Measures what docs/reliability.md says was measured, and writes it there, with date, commit and command.

    PYTHONPATH=. python benchmarks/reliability.py
    PYTHONPATH=. python benchmarks/reliability.py kills --times 20

Its parts: plans, the tests of `tests/faults`; kills, `benchmarks.kills`; and soak, `benchmarks.soak`. One that does not
end well is not written. The tables of what each plan expects are written from the code, by `python -m docs.generated`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

from docs.generated import put

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"


def main() -> None:
    """Exit status 1 where a part did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=200, help="runs that are killed")
    parser.add_argument("--candidates", type=int, default=4096, help="of the soak")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("parts", nargs="*", help="some of plans, kills and soak; by default all")
    chosen = parser.parse_args()
    commands = {
        "plans": ["-m", "pytest", "-q", "tests/faults"],
        "kills": ["benchmarks/kills.py", "--times", str(chosen.times)],
        "soak": ["benchmarks/soak.py", "--candidates", str(chosen.candidates)],
    }
    if unknown := [part for part in chosen.parts if part not in commands]:
        parser.error(f"'{unknown[0]}' is no part: give some of {', '.join(commands)}")
    page, commit, failed = chosen.page.resolve(), _commit(), False
    for part in chosen.parts or commands:
        load = os.getloadavg()[0]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ran = subprocess.run(
            [sys.executable, *commands[part]], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        print(ran.stdout, flush=True)
        if ran.returncode:
            failed = True
            continue
        when = f"On {date.today():%-d %B %Y}, at commit {commit}, on {os.cpu_count()} cores with a load of {load:.1f}"
        command = f"```bash\nPYTHONPATH=. .venv/bin/python {' '.join(commands[part])}\n```"
        measured = f"{when}:\n\n<!-- not run: takes long -->\n\n{command}\n\n{told(ran.stdout)}"
        page.write_text(put(page.read_text(), f"measured: {part}", measured))
    sys.exit(failed)


def told(output: str) -> str:
    """The table of what a command printed, or its last line where there is none."""
    rows = [line for line in output.splitlines() if line.startswith("|")]
    return "\n".join(rows) if rows else f"> {output.strip().splitlines()[-1].strip('= ')}"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty= with changes", "--exclude=*"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
