"""The command line: it parses and validates, hands over, and gives each kind of mistake its exit code.

torch and LangChain take seconds to import, so each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tap_agent import RUNS
from tap_agent.exit import Exit
from tap_agent.flags import (
    ActivationBitsOption,
    AddressOption,
    AlphaOption,
    BaseURLOption,
    BetaOption,
    BitsOption,
    BudgetOption,
    CacheLLMOption,
    CalibrationOption,
    ConfigOption,
    ControllerOption,
    DrawsOption,
    ExecutorOption,
    GammaOption,
    GenerationsOption,
    GroupsOption,
    ImagesOption,
    InputsOption,
    LLMOption,
    MaxCallsOption,
    MaxCostOption,
    MaxMinutesOption,
    NetworkOption,
    PinEndsOption,
    PopulationOption,
    RacingOption,
    SandboxOption,
    SearchRowsOption,
    SeedOption,
    TestRowsOption,
    TrackOption,
    TransformOption,
    WeightsOption,
    given,
)
from tap_eval.mistake import Mistake

if TYPE_CHECKING:
    from tap_agent.folder import RunFolder
    from tap_agent.result import Result
    from tap_agent.workshop import Workshop


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit codes: " + ", ".join(f"{code.value} {code.name.lower()}" for code in Exit) + ".",
    help="""Finds out how many bits each layer of a vision network deserves.

    A language model and evolution discover a *proxy*: a small Python function that scores how sensitive each
    layer is to quantization. Bits are allocated from its scores within a budget, and the network is quantized and
    measured. Start with `tap-agent run`; `tap-agent doctor` says what works on this machine.""",
)


@app.command()
def run(
    config: ConfigOption = None,
    network: NetworkOption = None,
    weights: WeightsOption = None,
    images: ImagesOption = None,
    calibration: CalibrationOption = None,
    search_rows: SearchRowsOption = None,
    test_rows: TestRowsOption = None,
    draws: DrawsOption = None,
    transform: TransformOption = None,
    budget: BudgetOption = None,
    bits: BitsOption = None,
    activation_bits: ActivationBitsOption = None,
    channel_groups: GroupsOption = None,
    pin_ends: PinEndsOption = None,
    generations: GenerationsOption = None,
    population: PopulationOption = None,
    controller: ControllerOption = None,
    alpha: AlphaOption = None,
    beta: BetaOption = None,
    gamma: GammaOption = None,
    racing: RacingOption = None,
    inputs: InputsOption = None,
    seed: SeedOption = None,
    llm: LLMOption = None,
    base_url: BaseURLOption = None,
    cache_llm: CacheLLMOption = None,
    max_cost: MaxCostOption = None,
    max_calls: MaxCallsOption = None,
    max_minutes: MaxMinutesOption = None,
    sandbox: SandboxOption = None,
    executor: ExecutorOption = None,
    address: AddressOption = None,
    track: TrackOption = None,
    path: Annotated[Path | None, typer.Option("--out", help="The run's folder; by default a new one in runs.")] = None,
) -> None:
    """Search a proxy for a network, and report what it achieves.

    Without flags: the embedded language model, a small CNN for handwritten digits, 3 bits on average. Images come in
    three disjoint parts: calibration, search (on which candidates are measured) and test (read once, at the end).
    """
    flags = given(locals(), "config", "path")
    from tap_agent.folder import RunFolder, usual_path
    from tap_agent.settings import read_settings
    from tap_agent.workshop import Workshop, cache_folder

    settings = read_settings(config, flags)
    with Workshop(settings, cache_folder()) as workshop:
        _check(workshop)
        folder = RunFolder.create(path, settings) if path else RunFolder.unused(usual_path(settings), settings)
        _search(folder, workshop)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    max_cost: MaxCostOption = None,
    max_calls: MaxCallsOption = None,
    max_minutes: MaxMinutesOption = None,
    executor: ExecutorOption = None,
    address: AddressOption = None,
) -> None:
    """Continue a run from its last checkpoint, with other limits where given; one that has finished is shown."""
    flags = given(locals(), "run")
    from tap_agent.settings import read_settings
    from tap_agent.track import Tracker, check
    from tap_agent.workshop import Workshop, cache_folder

    folder = _folder(run)
    if (result := folder.result()) is not None and result.stopped is None:
        check(folder.settings().track)
        with Tracker(folder, folder.settings()) as tracker:
            tracker.conclude(result)
        _show(folder, result)
        return
    with Workshop(read_settings(folder.path / "config.yaml", flags), cache_folder()) as workshop:
        _check(workshop)
        _search(folder, workshop)


@app.command()
def apply(
    proxy: Annotated[str, typer.Argument(metavar="PROXY_OR_RUN", help="A proxy's .py file, or a run's folder.")],
    config: ConfigOption = None,
    network: NetworkOption = None,
    weights: WeightsOption = None,
    images: ImagesOption = None,
    calibration: CalibrationOption = None,
    test_rows: TestRowsOption = None,
    draws: DrawsOption = None,
    transform: TransformOption = None,
    budget: BudgetOption = None,
    bits: BitsOption = None,
    activation_bits: ActivationBitsOption = None,
    channel_groups: GroupsOption = None,
    pin_ends: PinEndsOption = None,
    inputs: InputsOption = None,
    seed: SeedOption = None,
    sandbox: SandboxOption = None,
    executor: ExecutorOption = None,
    address: AddressOption = None,
    path: Annotated[Path | None, typer.Option("--out", help="File for the allocation, as in best.json.")] = None,
) -> None:
    """Use a proxy that was found before on any network, without a search.

    Given a run and neither --network nor --config, the run's own network, images and settings are taken.
    """
    flags = given(locals(), "proxy", "config", "path")
    from rich.markdown import Markdown

    from tap_agent import application
    from tap_agent.folder import make_parent, write
    from tap_agent.settings import read_settings
    from tap_agent.terminal.console import out, results_table
    from tap_agent.workshop import Workshop, cache_folder

    if path:
        make_parent(path)
    found = application.read_proxy(Path(proxy))
    if found.config is not None and config is None and network is None:
        config = found.config
    settings = read_settings(config, flags)
    with Workshop(settings, cache_folder()) as workshop:
        with out.status("opening network and images"):
            workshop.open()
        with out.status("scoring, allocating, quantizing and measuring") as status:
            applied = application.apply(found, workshop, lambda label: status.update(f"measuring {label}"))
    for bench in workshop.benches:
        for note in bench.notes:
            out.print(note)
    for table in applied.layers:
        out.print(Markdown(table))
    out.print(results_table(applied.rows, [network.budget or settings.budget for network in settings.networks]))
    out.print(
        f"scoring {applied.scoring_seconds:.4f} s, allocation {applied.allocation_seconds:.4f} s for "
        f"{len(workshop.benches[0].layers)} layers (the paper's Table 7, on its machine: 0.0133 s and 0.0645 s)"
    )
    if path:
        write(path.resolve(), applied.record)
        out.print(f"allocation: {path}")


@app.command()
def chat(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Folder of a finished run; by default the latest.")
    ] = None,
    proxy: Annotated[str | None, typer.Option(help="Name of a proxy of it; by default the best.")] = None,
    llm: LLMOption = None,
    base_url: BaseURLOption = None,
) -> None:
    """Refine a proxy by talking about it; what is accepted becomes a child in the run's family tree.

    Measuring and accepting ask first. The conversation is kept in the run and goes on where it was; its calls are
    in the run's account, but its limits do not stop a person.
    """
    from tap_agent.conversation import Conversation, unlimited
    from tap_agent.folder import RunMistake, runs
    from tap_agent.result import spent_text
    from tap_agent.settings import read_settings
    from tap_agent.terminal import chat
    from tap_agent.terminal.console import out
    from tap_agent.workshop import Workshop, cache_folder

    ended = [folder for folder in runs(RUNS) if folder.result()] if run is None else [_folder(run)]
    if not ended:
        raise RunMistake(f"no run in {RUNS} has ended: start one with `tap-agent run`.")
    result = ended[0].finished()
    out.print(f"[dim]{ended[0].path}[/dim]")
    settings = read_settings(ended[0].path / "config.yaml", {"llm": llm, "base_url": base_url})
    with Workshop(unlimited(settings), cache_folder()) as workshop:
        with out.status("opening network, images and sandbox"):
            workshop.open()
        with Conversation(ended[0], proxy or result.best, workshop) as conversation:
            chat.talk(conversation)
            out.print(f"[dim]the run, with its conversations: {spent_text(conversation.spent)}[/dim]")


@app.command("report")
def make_report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]) -> None:
    """Write the report of a finished run again, and print its table."""
    from tap_agent import report
    from tap_agent.folder import write

    folder = _folder(run)
    result = folder.finished()
    write(folder.report, report.render(result))
    _show(folder, result)


@app.command("list")
def list_runs(folder: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="Where the runs are.")] = RUNS) -> None:
    """List the runs, the newest first."""
    from tap_agent.folder import runs
    from tap_agent.terminal.console import out, runs_table

    found = runs(folder)
    if not found:
        out.print(f"no runs in {folder}: start one with `tap-agent run`.")
        return
    out.print(runs_table(found))


@app.command()
def ui(
    folder: Annotated[Path, typer.Argument(metavar="RUNS_DIR", help="Where the runs are.")] = RUNS,
    host: Annotated[str, typer.Option(help="Address; any but the loopback needs a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Show the runs in the browser: start, watch, stop and resume them, and talk about their proxies.

    The password, where others than this machine reach the page, comes from the environment variable TAP_UI_PASSWORD.
    """
    from tap_agent.page.app import PASSWORD, serve
    from tap_agent.page.desk import Desk
    from tap_agent.workshop import cache_folder

    password = os.environ.pop(PASSWORD, None) or None  # no run that the page starts inherits it
    with Desk(folder, cache_folder()) as desk, suppress(KeyboardInterrupt):
        serve(desk, host, port, password, browser=browser, tell=typer.echo)


@app.command()
def studio(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where the server listens; 0 is a free port.")] = 2024,
    host: Annotated[
        str, typer.Option(help="The address that it listens on; whoever reaches it can have code run here.")
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open Studio in the browser.")] = True,
) -> None:
    """Show the runs in LangGraph Studio: their history, forks from any step, and new searches.

    A run is a thread there; one that is started there is a run here. Ctrl-C ends the server.
    """
    from tap_agent.studio.server import serve

    serve(RUNS, host, port, browser=browser, tell=typer.echo)


@app.command("doctor")
def examine() -> None:
    """Say what works on this machine, and the next step for what does not."""
    from tap_agent.terminal import doctor
    from tap_agent.terminal.console import out
    from tap_agent.workshop import cache_folder

    findings = doctor.examine(cache_folder())
    for finding in findings:
        out.print(f"[{'green' if finding.works else 'red'}]{'ok  ' if finding.works else 'no  '}[/] {finding.text}")
    if not all(finding.works for finding in findings):
        raise typer.Exit(Exit.FAILED)


def run_app() -> None:
    """The program; a mistake is one sentence on stderr and an exit code."""
    try:
        app()
    except Mistake as mistake:
        from tap_agent.terminal.console import plain

        typer.secho("error: ", fg="red", nl=False, err=True)
        typer.echo(plain(str(mistake)), err=True)
        sys.exit(Exit[mistake.kind.upper()])


def _folder(path: Path) -> RunFolder:
    """A run by its folder, or by its name in `runs`."""
    from tap_agent.folder import RunFolder

    return RunFolder(path if path.exists() or not (RUNS / path).exists() else RUNS / path)


def _check(workshop: Workshop) -> None:
    """Opens every part, so that what is missing shows before anything is written."""
    from tap_agent.terminal.console import out
    from tap_agent.track import check

    check(workshop.settings.track)
    with out.status("opening network, images, sandbox and language model"):
        workshop.check()


def _search(folder: RunFolder, workshop: Workshop) -> None:
    from agents.account import LimitMistake
    from tap_agent.session import search
    from tap_agent.terminal.display import make_display
    from tap_agent.terminal.interrupt import interruptible
    from tap_agent.track import Tracker

    settings = workshop.settings
    with folder.held(), interruptible(workshop.stopping):
        try:
            with make_display(settings, folder.events()) as display, Tracker(folder, settings) as tracker:

                def listen(event: dict[str, Any]) -> None:
                    display(event)
                    tracker(event)

                result = search(folder, workshop, listen)
                tracker.conclude(result)
        except BaseException:
            typer.echo(f"stopped; continue with: tap-agent resume {folder.path}", err=True)
            raise
    _show(folder, result)
    if result.stopped:
        raise LimitMistake(
            f"{result.stopped} This is the best so far; `tap-agent resume {folder.path}` takes the flag."
        )


def _show(folder: RunFolder, result: Result) -> None:
    from tap_agent.result import summary
    from tap_agent.terminal.console import out, results_table

    best = result.candidate(result.best)
    out.print(results_table(result.table, [network.budget for network in result.networks]))
    out.print(f"best proxy {best.name}, fitness {best.value:.4f}: {folder.path / 'proxies' / best.name}.py")
    out.print(summary(result))
    out.print(f"report: {folder.report}")
