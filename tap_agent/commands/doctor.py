"""`tap-agent doctor`: what works on this machine."""

from __future__ import annotations

import typer

from tap_agent.exit import Exit


def examine() -> None:
    """Say what works on this machine, and the next step for what does not."""
    from tap_agent.paths import cache_folder
    from tap_agent.terminal import doctor
    from tap_agent.terminal.console import out

    findings = doctor.examine(cache_folder())
    for finding in findings:
        out.print(f"[{'green' if finding.works else 'red'}]{'ok  ' if finding.works else 'no  '}[/] {finding.text}")
    if not all(finding.works for finding in findings):
        raise typer.Exit(Exit.FAILED)
