"""`tap-agent apply`: bits for a network that is at hand, without a search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tap_agent.commands.options import ConfigOption, takes_settings
from tap_agent.settings.flag import BITS, NETWORK

if TYPE_CHECKING:
    from tap_agent.sessions.apply import Applied


@takes_settings
def apply(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A proxy's .py file; a run's folder; an allocation file, which is a run's best.json or what --out "
            "wrote; uniform:BITS; or uniform, for the most bits within the budget.",
        ),
    ],
    config: ConfigOption = None,
    path: Annotated[
        Path | None, typer.Option("--out", help="File for the allocation, as in best.json, of a single budget.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="HTML file for accuracy against size: the table, and a figure of it.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="3bit (on average), 87% (smaller), 0.1MB, or 1.2GBOPs; several, as 2bit,3bit,4bit, give a curve. "
            "Without one, baselines get the size that uniform:BITS or an allocation file takes, and a proxy gets the "
            "budget of its run or config, or 3bit.",
            rich_help_panel=BITS,
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(min=1, help="Draws of calibration images to measure each row under.", rich_help_panel=NETWORK),
    ] = 1,
    **flags: Any,
) -> None:
    """Find out what bits are worth on a network that is at hand, without a search.

    Allocates them where WHAT is a rule, quantizes, measures on the test split, and prints the table beside the
    baselines. Given a run, its best.json or one of its proxies, and neither --network nor --config, the run's own
    network, images and settings are taken.
    """
    from tap_agent.paths import cache_folder
    from tap_agent.runs.folder import make_parent, write
    from tap_agent.sessions import apply as session
    from tap_agent.sessions.resources import Resources
    from tap_agent.sessions.subject import FileSubject, ProxySubject, read_subject
    from tap_agent.settings.read import read_settings
    from tap_agent.terminal.bar import Bar
    from tap_agent.terminal.console import err, out

    for file in filter(None, (path, plot)):
        make_parent(file)
    subject = read_subject(what)
    if subject.config is not None and config is None and flags["network"] is None:
        config = subject.config
    settings = read_settings(config, flags)
    if isinstance(subject, FileSubject):
        settings = subject.offered(settings, {name for name, value in flags.items() if value is not None})
    asked = session.budgets(settings, budget, subject)
    if path:
        session.check_single(asked)
    with Resources(session.opening(settings, draws), cache_folder()) as resources, Bar() as bar:
        resources.watch = bar.watch
        bar.begin("opening network and images")
        benches = resources.benches
        if isinstance(subject, ProxySubject):
            resources.open()
        for note in (note for bench in benches for note in bench.notes):
            out.print(note, markup=False)
        applied = session.apply(subject, asked, resources, draws, bar)
    _show(applied, len(benches[0].layers))
    if not any(asked) and any(row.kind == "baseline" for row in applied.rows):
        sizes = ", ".join(row.budget for row in applied.rows if row.kind == "proxy")
        out.print(f"the baselines have the size that {what} takes: {sizes}", markup=False)
    for sentence in applied.refused:
        err.print(f"left out: {sentence}", markup=False)
    if path:
        write(path.resolve(), applied.record)
        out.print(f"allocation: {path}")
    if plot:
        from tap_agent.report import html

        write(plot.resolve(), html.render_rows(f"apply {what}", applied.rows))
        out.print(f"figure: {plot}")


def _show(applied: Applied, layers: int) -> None:
    from rich.markdown import Markdown

    from tap_agent.terminal.console import out, results_table

    for table in applied.layers:
        out.print(Markdown(table))
    out.print(results_table(applied.rows, {row.budget for row in applied.rows}), soft_wrap=False)
    if applied.seconds:
        scoring, allocation = applied.seconds
        out.print(
            f"scoring {scoring:.4f} s, allocation {allocation:.4f} s for {layers} layers (the paper's Table 7, on its "
            "machine: 0.0133 s and 0.0645 s)"
        )
