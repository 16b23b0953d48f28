"""`tap-agent apply`: a proxy that was found before, on any network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tap_agent.commands.options import ConfigOption, takes_settings


@takes_settings
def apply(
    proxy: Annotated[str, typer.Argument(metavar="PROXY_OR_RUN", help="A proxy's .py file, or a run's folder.")],
    config: ConfigOption = None,
    path: Annotated[Path | None, typer.Option("--out", help="File for the allocation, as in best.json.")] = None,
    **flags: Any,
) -> None:
    """Use a proxy that was found before on any network, without a search.

    Given a run and neither --network nor --config, the run's own network, images and settings are taken.
    """
    from rich.markdown import Markdown

    from tap_agent.paths import cache_folder
    from tap_agent.runs.folder import make_parent, write
    from tap_agent.sessions import apply as session
    from tap_agent.sessions.resources import Resources
    from tap_agent.settings.read import read_settings
    from tap_agent.terminal.console import out, results_table

    if path:
        make_parent(path)
    found = session.read_proxy(Path(proxy))
    if found.config is not None and config is None and flags["network"] is None:
        config = found.config
    settings = read_settings(config, flags)
    with Resources(settings, cache_folder()) as resources:
        with out.status("opening network and images"):
            resources.open()
            notes = [note for bench in resources.benches for note in bench.notes]
        for note in notes:
            out.print(note, markup=False)
        with out.status("scoring, allocating, quantizing and measuring") as status:
            applied = session.apply(found, resources, lambda label: status.update(f"measuring {label}"))
    for table in applied.layers:
        out.print(Markdown(table))
    out.print(results_table(applied.rows, [network.budget or settings.budget for network in settings.networks]))
    out.print(
        f"scoring {applied.scoring_seconds:.4f} s, allocation {applied.allocation_seconds:.4f} s for "
        f"{len(resources.benches[0].layers)} layers (the paper's Table 7, on its machine: 0.0133 s and 0.0645 s)"
    )
    if path:
        write(path.resolve(), applied.record)
        out.print(f"allocation: {path}")
