"""Asks pip-audit for known weaknesses of what constraints.txt holds, less those that .ci/accepted names.

Exit status 1 where there are any. Where the database cannot be reached nothing was checked, which is said and passes:
a set-up without the network is not the worse for it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_UNREACHABLE = re.compile(r"connect|timed? ?out|max retries|resolve|unreachable|proxy|ssl", re.IGNORECASE)
_ACCEPTED = re.compile(r"(?P<id>[A-Z]+-[\w-]+) (?P<until>\d{4}-\d\d-\d\d) (?P<reason>\S.*)")


def accepted(text: str, today: str) -> list[str]:
    """The findings of a text that are accepted `today`: a line each, ID, day on which that ends, and reason."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            parts = _ACCEPTED.fullmatch(line.strip())
            if parts is None:
                raise SystemExit(f".ci/accepted, line {number}: write ID, YYYY-MM-DD and the reason, by spaces.")
            if parts["until"] >= today:
                found.append(parts["id"])
    return found


def verdict(said: str, errors: str) -> tuple[int, str]:
    """The exit status and what to say, by what pip-audit wrote: its report in JSON, or none."""
    try:
        report = json.loads(said)
    except ValueError:
        reason = (errors.strip().splitlines() or ["it said nothing"])[-1][:200]
        if _UNREACHABLE.search(errors):
            return 0, f"Nothing was checked: the database of weaknesses cannot be reached ({reason})."
        return 1, f"Nothing was checked: pip-audit failed ({reason})."
    weak = [
        f"{each['name']} {each['version']}: {finding['id']}, mended in {', '.join(finding['fix_versions']) or 'none'}"
        for each in report["dependencies"]
        for finding in each.get("vulns", [])
    ]
    unknown = [each for each in report["dependencies"] if "skip_reason" in each]
    if unknown and len(unknown) == len(report["dependencies"]):
        return 0, f"Nothing was checked: where packages come from here knows none ({unknown[0]['skip_reason']})."
    if not weak:
        known = len(report["dependencies"]) - len(unknown)
        return 0, f"No known weakness in {known} packages; {len(unknown)} could not be checked."
    next_step = "Take a mended release and `make lock`, or accept it in .ci/accepted with a day and a reason."
    return 1, "\n".join([*weak, next_step])


def main() -> None:
    """Asks, and ends with the verdict."""
    import datetime

    names = accepted((ROOT / ".ci" / "accepted").read_text(), datetime.datetime.now(datetime.UTC).date().isoformat())
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off"]
    ran = subprocess.run(  # noqa: S603 pip-audit, and the names in our own file
        [*command, *(word for name in names for word in ("--ignore-vuln", name))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    status, words = verdict(ran.stdout, ran.stderr)
    print(words)
    sys.exit(status)


if __name__ == "__main__":
    main()
