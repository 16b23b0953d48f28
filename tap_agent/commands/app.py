"""The program: it parses and validates, hands over, and gives each kind of mistake its exit code.

torch and LangChain take seconds to import, so each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from tap_agent.commands.apply import apply
from tap_agent.commands.benchmark import benchmark
from tap_agent.commands.chat import chat
from tap_agent.commands.doctor import examine
from tap_agent.commands.inspect import look
from tap_agent.commands.list import list_runs
from tap_agent.commands.report import make_report
from tap_agent.commands.run import resume, run
from tap_agent.commands.studio import studio
from tap_agent.commands.table import table
from tap_agent.commands.ui import ui
from tap_agent.exit import Exit
from tap_eval.mistake import Mistake
from tap_eval.storage import told

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
app.command()(run)
app.command()(resume)
app.command()(apply)
app.command()(table)
app.add_typer(benchmark, name="benchmark")
app.command()(chat)
app.command("report")(make_report)
app.command("inspect")(look)
app.command("list")(list_runs)
app.command()(ui)
app.command()(studio)
app.command("doctor")(examine)


def run_app() -> None:
    """The program; a mistake is one sentence on stderr and an exit code, and so is a disk that takes no more."""
    try:
        app()
    except Mistake as mistake:
        _tell(mistake)
    except Exception as error:
        if (sentence := told(error)) is None:
            raise
        _tell(sentence)


def _tell(mistake: Mistake) -> NoReturn:
    from tap_agent.terminal.console import plain

    typer.secho("error: ", fg="red", nl=False, err=True)
    typer.echo(plain(str(mistake)), err=True)
    sys.exit(Exit[mistake.kind.upper()])
