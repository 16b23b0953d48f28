"""`tap-agent benchmark`: measured allocations in a file, and what foretells them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tap_agent.commands.options import ConfigOption, takes_settings_of

benchmark = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Hold proxies against measured allocations.

    `build` measures many allocations of a network into one file; `score` says how well proxies and baselines foretell
    what is in it, which takes no network, no images and a moment.""",
)
_FILE = "Parquet file of measured allocations; without one, that of ResNet-20 on CIFAR-10 that comes with the program."


@benchmark.command()
@takes_settings_of("apply", but=("baselines", "channel_groups", "finish", "sandbox"))  # which change nothing here
def build(
    path: Annotated[Path, typer.Option("--out", help="Parquet file to write.")],
    config: ConfigOption = None,
    count: Annotated[int, typer.Option(min=16, help="Allocations to measure.")] = 500,
    least: Annotated[float, typer.Option(min=2, max=8, help="Average bits a weight of the smallest.")] = 2,
    most: Annotated[float, typer.Option(min=2, max=8, help="Average bits a weight of the largest.")] = 4,
    strata: Annotated[int, typer.Option(min=1, help="Ranges of size between them, with as many of each.")] = 8,
    **flags: Any,
) -> None:
    """Measure allocations of a network, drawn at random, on the search images.

    Candidates of a search are measured likewise: rounded a layer at a time, under the first draw of calibration images.
    What was measured before is not measured again.
    """
    from tap_agent.paths import cache_folder
    from tap_agent.runs.folder import check_apart, check_file
    from tap_agent.sessions import benchmark as session
    from tap_agent.sessions.resources import Resources
    from tap_agent.settings.read import read_settings
    from tap_agent.terminal.bar import Bar
    from tap_agent.terminal.console import err, out
    from tap_eval.mistake import BenchmarkMistake

    if least >= most:
        raise BenchmarkMistake(f"--least {least:g} is not below --most {most:g}: give a range of average bits.")
    check_file(path)
    settings = read_settings(config, flags | {"budget": f"{most:g}bit"})
    check_apart((path,), (config, *settings.files))
    with Resources(settings, cache_folder()) as resources, Bar() as bar:
        resources.watch = bar.watch
        bar.begin("opening network and images")
        for note in (note for bench in resources.benches for note in bench.notes):
            out.print(note, markup=False)
        left_out = session.build(resources, path.resolve(), least, most, strata, count, bar)
    for sentence in left_out:
        err.print(f"left out: {sentence}", markup=False)
    out.print(f"benchmark: {path} ({count} allocations, {path.stat().st_size / 1024:,.1f} KiB)", markup=False)


@benchmark.command()
def score(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROXY|BASELINE]...",
            help="Proxies as `apply` takes them, and baselines by name; without any, all baselines.",
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option(help=_FILE)] = None,
) -> None:
    """Say how well proxies and baselines foretell what allocations of about one size are worth.

    Spearman's and Kendall's coefficients of what is foretold with the KL divergence that was measured, within ranges of
    size and in the mean over them, with 95 % intervals of a bootstrap over allocations (the paper's Eq. 3). 1 ranks all
    as they were measured, 0 says nothing.
    """
    from tap_agent.sessions import benchmark as session
    from tap_agent.terminal.benchmark import held_table
    from tap_agent.terminal.console import out
    from tap_eval.benchmark.benchmark import SHIPPED, read
    from tools.sandbox import MontySandbox

    against = read(file or SHIPPED)
    with MontySandbox() as sandbox:
        held = session.hold(names or [], against, sandbox)
    out.print(held_table(against, held), soft_wrap=False)
