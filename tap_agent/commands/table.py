"""`tap-agent table`: many runs in one table, with what papers say beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tap_agent.commands.options import ConfigOption, takes_settings_of
from tap_agent.paths import TABLES
from tap_eval.mistake import Mistake

if TYPE_CHECKING:
    from tap_agent.tables.line import Line
    from tap_agent.tables.plan import Planned

_SECONDS = 10.0
"""between two writings of a table that grows"""


@takes_settings_of("run", but=("track",))
def table(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="ptq, qat, vit or cost, after the paper's tables; ablation; or a plan of your own, as FILE.yaml.",
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ABLATION]...",
            help="Of ablation: alpha, population, draws, llm, executability, controller, worth or rounding; without "
            "any, all of them.",
        ),
    ] = None,
    config: ConfigOption = None,
    path: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the table and its searches; by default tables/WHAT."),
    ] = None,
    proxies: Annotated[
        list[str] | None,
        typer.Option(
            "--proxy", help="A row's proxy, in place of the plan's: a run's folder, a .py file or a published one."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds of searches, and of what finding bits costs; by default 5.")
    ] = None,
    **flags: Any,
) -> None:
    """Measure a table of many runs, or go on with one that was interrupted.

    Rows are measured as `apply` does, or searched as `run` does. What was measured is not measured again: the same
    command goes on after Ctrl-C, a kill or a failure. The table is written as it grows: table.md, table.parquet and
    table.html. Figures of papers are marked as cited. What cannot be measured here says why.
    """
    from tap_agent.runs.folder import make_parent
    from tap_agent.settings.read import ConfigMistake
    from tap_agent.tables.plan import ABLATION, ABLATIONS, planned

    if names and what != ABLATION:
        raise ConfigMistake(f"{what} takes no {names[0]}: give {ABLATION} before names of ablations.")
    if unknown := [name for name in names or () if name not in ABLATIONS]:
        raise ConfigMistake(f"'{unknown[0]}' is no ablation: give some of {', '.join(ABLATIONS)}.")
    chosen: Sequence[str | None] = names or (ABLATIONS if what == ABLATION else (None,))
    plans = [planned(what, name, config, flags, tuple(proxies or ()), seeds) for name in chosen]
    for plan in plans:
        folder = path if path and len(plans) == 1 else (path or TABLES) / plan.name
        make_parent(folder / "table.md")
        _measure(plan, folder.resolve())


def _measure(plan: Planned, folder: Path) -> None:
    import threading
    import time

    from tap_agent.paths import cache_folder
    from tap_agent.sessions.place import Place
    from tap_agent.sessions.table import tabulate
    from tap_agent.terminal.console import out
    from tap_agent.terminal.interrupt import interruptible
    from tap_agent.terminal.table import TableBar, print_lines

    lines: list[Line] = []
    written = time.monotonic()
    with TableBar() as bar:
        place = Place(cache_folder().resolve(), folder / "runs", bar, threading.Event())
        with interruptible(place.stopping):
            try:
                for lines in tabulate(plan, place):
                    if time.monotonic() - written > _SECONDS:
                        _write(plan, lines, folder)
                        written = time.monotonic()
            except BaseException as error:
                if lines or not isinstance(error, Mistake):
                    typer.echo("stopped; the same command goes on from here", err=True)
                raise
            finally:
                if lines:
                    _write(plan, lines, folder)
    print_lines(plan.plan, lines)
    out.print(f"{place.measured:,} values were measured, others recalled")
    for ending in ("md", "parquet", "html"):
        out.print(f"table: {folder / f'table.{ending}'}", markup=False)


def _write(plan: Planned, lines: Sequence[Line], folder: Path) -> None:
    from tap_agent.report.lines import markdown, page
    from tap_agent.runs.files import write
    from tap_agent.sessions.record import versions
    from tap_agent.tables import parquet

    settings = [variant.settings.model_dump(mode="json") for variant in plan.variants]
    about = {"plan": plan.plan.model_dump(mode="json"), "settings": settings, "versions": versions()}
    write(folder / "table.md", markdown(plan.plan, lines))
    parquet.write(folder / "table.parquet", lines, about)
    write(folder / "table.html", page(plan.plan, lines))
