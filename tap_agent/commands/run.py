"""`tap-agent run` and `tap-agent resume`: a search, from the start or from its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tap_agent.commands.options import ConfigOption, takes_settings

if TYPE_CHECKING:
    from tap_agent.runs.folder import RunFolder
    from tap_agent.sessions.resources import Resources


@takes_settings
def run(
    config: ConfigOption = None,
    path: Annotated[Path | None, typer.Option("--out", help="The run's folder; by default a new one in runs.")] = None,
    **flags: Any,
) -> None:
    """Search a proxy for a network, and report what it achieves.

    Without flags: the embedded language model, a small CNN for handwritten digits, 3 bits on average. Images come in
    three disjoint parts: calibration, search (on which candidates are measured) and test (read once, at the end).
    """
    from tap_agent.paths import cache_folder
    from tap_agent.runs.folder import RunFolder, check_unused, usual_path
    from tap_agent.sessions.resources import Resources
    from tap_agent.settings.read import read_settings

    settings = read_settings(config, flags)
    check_unused(path or usual_path(settings))
    with Resources(settings, cache_folder()) as resources:
        _check(resources)
        folder = RunFolder.create(path, settings) if path else RunFolder.unused(usual_path(settings), settings)
        _search(folder, resources)


@takes_settings
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    **flags: Any,
) -> None:
    """Continue a run from its last checkpoint, with other limits where given; one that has finished is shown.

    Files of it that are not what was written are made anew where that can be, and named where it cannot.
    """
    from tap_agent.paths import cache_folder
    from tap_agent.runs.folder import find
    from tap_agent.runs.mending import mend
    from tap_agent.runs.tracking import Tracker, check
    from tap_agent.sessions.resources import Resources
    from tap_agent.terminal.console import err, show_result
    from tap_eval.mistake import ImagesMistake, WeightsMistake

    folder = find(run)
    with folder.held():
        for sentence in mend(folder):
            err.print(sentence, markup=False)
    if (result := folder.result()) is not None and result.stopped is None:
        check(folder.settings().track)
        with Tracker(folder, folder.settings()) as tracker:
            tracker.conclude(result)
        show_result(folder, result)
        return
    with Resources(folder.settings(flags), cache_folder()) as resources:
        try:
            _check(resources)
        except (WeightsMistake, ImagesMistake) as mistake:
            raise type(mistake)(
                f"{mistake} A run goes on with what its config.yaml names: put back what has moved, or a link."
            ) from mistake
        _search(folder, resources)


def _check(resources: Resources) -> None:
    """Opens every part, so that what is missing shows before anything is written."""
    from tap_agent.runs.tracking import check
    from tap_agent.terminal.console import out

    check(resources.settings.track)
    with out.status("opening network, images, sandbox and language model"):
        resources.check()


def _search(folder: RunFolder, resources: Resources) -> None:
    from agents.account import LimitMistake
    from tap_agent.runs.mending import check_calls
    from tap_agent.runs.tracking import Tracker
    from tap_agent.sessions.outcome import NoProxyMistake
    from tap_agent.sessions.search import search
    from tap_agent.terminal.console import show_result
    from tap_agent.terminal.display import make_display
    from tap_agent.terminal.interrupt import interruptible

    settings = resources.settings
    check_calls(folder)
    with folder.held(), interruptible(resources.stopping):
        try:
            with make_display(settings, folder.events()) as display, Tracker(folder, settings) as tracker:

                def listen(event: dict[str, Any]) -> None:
                    display(event)
                    tracker(event)

                result = search(folder, resources, listen)
                tracker.conclude(result)
        except NoProxyMistake:  # a search that has ended: to go on with it would end it again
            raise
        except BaseException:
            typer.echo(f"stopped; continue with: tap-agent resume {folder.path}", err=True)
            raise
    show_result(folder, result)
    if result.stopped:
        raise LimitMistake(
            f"{result.stopped} This is the best so far; `tap-agent resume {folder.path}` takes the flag."
        )
