"""`tap-agent doctor`: what works on this machine."""

from __future__ import annotations

import typer

from tap_agent.exit import Exit


def examine() -> None:
    """Say what works on this machine, and the next step for what does not."""
    from rich.markup import escape

    from tap_agent.paths import cache_folder
    from tap_agent.terminal import doctor
    from tap_agent.terminal.console import out

    findings = doctor.examine(cache_folder())
    for finding in findings:
        mark = "[green]ok  [/]" if finding.works else "[red]no  [/]"
        out.print(f"{mark} {escape(finding.text)}")
    if not all(finding.works for finding in findings):
        raise typer.Exit(Exit.FAILED)
