"""`tap-agent apply`: bits for a network that is at hand, without a search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tap_agent.commands.options import ConfigOption, takes_settings
from tap_agent.settings.flag import BITS, NETWORK
from tap_eval.export.extra import Weights

if TYPE_CHECKING:
    from tap_agent.sessions.apply import Applied


@takes_settings
def apply(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A proxy's .py file; a published proxy: paper, which is the formula of the paper's Table 2, "
            "or channel_noise; a run's folder; an allocation file, which is a run's best.json or what --out wrote; "
            "uniform:BITS; or uniform, for the most bits within the budget.",
        ),
    ],
    config: ConfigOption = None,
    path: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="FILE.json for bits and figures, as in best.json; FILE.safetensors or FILE.onnx for the network, "
            "packed; FILE.pt2 for a program of torch.export. Of a single budget.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="HTML file for accuracy against size: the table, and a figure of it.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="3bit (on average), 87% (smaller), 0.1MB, 1.2GBOPs or 2ms; several, as 2bit,3bit,4bit, give a curve. "
            "Without one, baselines get the size that uniform:BITS or an allocation file takes, and a proxy gets the "
            "budget of its run or config, or 3bit.",
            rich_help_panel=BITS,
        ),
    ] = None,
    onnx_weights: Annotated[
        Weights,
        typer.Option(
            help="How FILE.onnx stores weights: packed at exactly their bits, which any runtime unpacks as it loads "
            "them; native, in ONNX's own types of 2, 4 and 8 bits, for compilers; or int8."
        ),
    ] = "packed",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Write no file of a network of which anything is in float32: a tensor that no layer holds, what is "
            "computed between layers, or a layer that ONNX Runtime multiplies so. Without it they are named.",
        ),
    ] = False,
    draws: Annotated[
        int,
        typer.Option(min=1, help="Draws of calibration images to measure each row under.", rich_help_panel=NETWORK),
    ] = 1,
    **flags: Any,
) -> None:
    """Find out what bits are worth on a network that is at hand, without a search.

    Allocates them where WHAT is a rule, quantizes, measures on the test split, and prints the table beside the
    baselines. Given a run, its best.json or one of its proxies, and neither --network nor --config, the run's own
    network, images and settings are taken; so are those that an allocation file holds.
    """
    from tap_agent.paths import cache_folder
    from tap_agent.runs.files import write
    from tap_agent.runs.folder import check_apart, check_file
    from tap_agent.sessions import apply as session
    from tap_agent.sessions import export
    from tap_agent.sessions.resources import Resources
    from tap_agent.sessions.subject import FileSubject, ProxySubject, read_subject
    from tap_agent.settings.read import read_settings
    from tap_agent.terminal.bar import Bar
    from tap_agent.terminal.console import err, out
    from tap_eval.mistake import ExportMistake, Mistake

    how = export.How(onnx_weights, strict)
    if path:
        export.check(path, how)
    elif strict:
        raise ExportMistake("--strict is about a file of the network: give --out FILE.onnx or another with it.")
    if plot:
        check_file(plot)
    subject = read_subject(what)
    own = subject.given if config is None and flags["network"] is None else None
    settings = read_settings(own or config, flags)
    if isinstance(subject, FileSubject):
        settings = subject.fitted(settings, {name for name, value in flags.items() if value is not None}, own)
    check_apart((path, plot), (Path(what), config, *settings.files))
    asked = session.budgets(settings, budget, subject)
    if path:
        session.check_single(asked)
    with Resources(session.opening(settings, draws), cache_folder()) as resources, Bar() as bar:
        resources.watch = bar.watch
        bar.begin("opening network and images")
        benches = resources.benches
        if isinstance(subject, ProxySubject):
            resources.open()
        differences = subject.differences(benches) if isinstance(subject, FileSubject) else []
        if path and strict:
            export.check_strict(path, benches)
        for note in (*(note for bench in benches for note in bench.notes), *differences):
            out.print(note, markup=False)
        applied = session.apply(subject, asked, resources, draws, bar)
        files: list[export.Written] = []
        unwritten = None
        if path:
            bar.begin(f"writing {path}")
            try:
                files = export.write_all(
                    path.resolve(),
                    applied.chosen,
                    lambda: session.allocation_record(subject, applied, resources.settings),
                    how,
                )
            except Mistake as mistake:  # what was measured is shown first
                unwritten = mistake
    _show(applied, len(benches[0].layers))
    if isinstance(subject, FileSubject) and not differences:
        for each in applied.chosen:
            if said := subject.confirmed(each.bench, each.row.test.correct, each.row.test.count):
                out.print(said, markup=False)
    if not any(asked) and any(row.kind == "baseline" for row in applied.rows):
        sizes = ", ".join(row.budget for row in applied.rows if row.kind == "proxy")
        out.print(f"the baselines have the size that {what} takes: {sizes}", markup=False)
    for sentence in applied.refused:
        err.print(f"left out: {sentence}", markup=False)
    for written in files:
        file, kind = written.path, "allocation" if written.path.suffix == export.ALLOCATION else "model"
        out.print(f"{kind}: {path if len(files) == 1 else file} ({file.stat().st_size / 1024:,.1f} KiB)", markup=False)
        for note in written.notes:
            out.print(f"  {note}", markup=False)
    if plot:
        from tap_agent.report import html

        write(plot.resolve(), html.render_rows(f"apply {what}", applied.rows))
        out.print(f"figure: {plot}", markup=False)
    if unwritten:
        raise unwritten


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
