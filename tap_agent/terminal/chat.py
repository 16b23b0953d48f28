"""The conversation in the terminal: it reads lines, shows the answer as it comes, and asks for consent."""

from __future__ import annotations

import itertools
import re
import readline  # noqa: F401  # gives input() a history
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.markup import escape

from graphs.refinement import HELP
from tap_agent.sessions.conversation import Conversation, Part
from tap_agent.terminal.console import out, plain
from tap_eval.mistake import Mistake

_FILE = re.compile(r"use\s+(\S*[./~]\S*)")
_WRAPPING = Console()
WORDS = """\
edit          the code in your editor; what you save is the next version
use FILE      the code in a file as the next version
again         the rest of an answer that was cut off
quit          leave; the conversation goes on where it was
"""


def converse(conversation: Conversation, read: Callable[[str], str] = input) -> None:
    """Goes on until the person leaves: by `quit`, or by ending the input."""

    def interrupt(*_: object) -> None:
        conversation.stop()  # else the graph would wait for the model before Ctrl-C is heard
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        _converse(conversation, read)
    finally:
        signal.signal(signal.SIGINT, before)


def _converse(conversation: Conversation, read: Callable[[str], str]) -> None:
    version = conversation.version
    out.print(f"[bold]{version.name or 'a draft'}[/bold]: {escape(plain(version.thought))}", highlight=False)
    out.print("[dim]help lists the commands; quit leaves.[/dim]")
    if conversation.unanswered:
        out.print("[dim]The last message was not answered; again goes on.[/dim]")
    while True:
        try:
            _settle(conversation, read)
            said = read("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            out.print()
            return
        if said.lower() in ("quit", "exit"):
            return
        if said:
            _show(conversation, _turn(conversation, said))


def _turn(conversation: Conversation, said: str) -> Iterator[Part]:
    """What is said in answer to one line."""
    match said:
        case "again" if conversation.unanswered:
            return conversation.again()
        case "again":
            return iter([Part("words", "There is nothing to go on with.")])
        case "help" | "HELP" | "?":
            return iter([Part("words", f"```\n{WORDS}{HELP}\n```\n\nAnything else is said to the agent.")])
        case _ if named := _FILE.fullmatch(said):
            try:
                code = Path(named[1]).expanduser().read_text()
            except (OSError, ValueError, RuntimeError) as error:  # of the file, its text or its name
                return iter([Part("words", f"{named[1]} cannot be read: {error}")])
            return conversation.say(f"use\n```python\n{code}\n```")
        case "edit":
            try:
                edited = click.edit(conversation.version.code, extension=".py")
            except click.ClickException as error:
                return iter([Part("words", f"{error.format_message()} The variable EDITOR names another.")])
            return conversation.say(f"use\n```python\n{edited}\n```") if edited else iter([Part("words", "Unchanged.")])
        case _:
            return conversation.say(said)


def _settle(conversation: Conversation, read: Callable[[str], str]) -> None:
    """Asks what the graph has stopped for, until it has not."""
    while questions := conversation.questions:
        answers = {
            each.identity: read(f"{plain(each.text)} [yes, no, a number] ").strip() or "no" for each in questions
        }
        _show(conversation, _answer(conversation, answers))


def _answer(conversation: Conversation, answers: dict[str, str]) -> Iterator[Part]:
    yield from conversation.answer(answers)  # a mistake is shown as one of an answer is


def _show(conversation: Conversation, answer: Iterator[Part]) -> None:
    """Prints an answer as it comes; a failure of the model, or Ctrl-C, leaves the conversation as it was."""
    try:
        for kind, parts in itertools.groupby(answer, lambda part: part.kind):
            if kind == "words":
                _print_words(plain(part.text) for part in parts)
                continue
            for part in parts:
                text = part.text if kind == "call" else (part.text.splitlines() or [""])[0]
                out.print(f"{'→' if kind == 'call' else '←'} {plain(text)}", style="dim", highlight=False, markup=False)
    except Mistake as mistake:
        out.print(plain(str(mistake)), style="red", highlight=False, markup=False)
    except KeyboardInterrupt:
        out.print("stopped; again goes on." if conversation.unanswered else "stopped.", style="dim")


def _print_words(texts: Iterator[str]) -> None:
    """Markdown that grows in a terminal, and plain text elsewhere."""
    said = ""
    if not out.is_terminal:
        out.print("".join(texts), highlight=False, markup=False)
        return
    with Live(console=_WRAPPING, vertical_overflow="visible") as live:
        for text in texts:
            said += text
            live.update(Markdown(said))
