"""The pages say what is so: their commands and code run, their flags exist, their drawing is the graph's."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from docs.generated import filled
from graphs.search import Search, SearchSettings
from tap_agent.commands.app import app
from tap_agent.exit import Exit
from tap_agent.settings.model import NetworkSettings, Settings
from tests.agents.scripted import ChatServer
from tests.docs.pages import PAGES, ROOT, Command, blocks, inline
from tests.graphs.test_search import script
from tests.tap_agent.program import tap

SMALL = {
    "run": ["--population", "2", "--generations", "0", "--draws", "1"],
    "apply": ["--test", "60", "--draws", "1"],
    "table": ["--search", "60", "--test", "60", "--draws", "1"],
}
OF_ONE_NETWORK = ["--search", "60", "--test", "60"]
OTHERS = {"make", "pip", "mlflow", "tensorboard", "mkdocs", ".venv/bin/python", ".venv/bin/mkdocs"}
"""programs whose commands are not ours to check"""
GROUPS = ("benchmark",)
"""commands that have commands of their own"""
FOREIGN_FLAGS = {"--head", "--no-deps"}


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with ChatServer(script) as opened:
        yield opened


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path, server: ChatServer) -> Path:
    """The run that the pages call RUN, with as many candidates as a page names."""
    folder = tmp_path_factory.mktemp("finished") / "RUN"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAP_CACHE", str(cache))
        sizes = ["--population", "7", "--generations", "1", "--draws", "1", "--seed", "5"]
        assert tap("run", *sizes, "--llm", "scripted", "--base-url", server.url, "--out", str(folder)) == Exit.OK
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_and_the_code_of_a_page_run(
    page: Path, tmp_path: Path, cache: Path, server: ChatServer, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAP_CACHE", str(cache))
    monkeypatch.setattr(sys, "stdin", io.StringIO("show\nundo\nquit\n" * 9))  # a conversation for each `chat`
    monkeypatch.syspath_prepend(tmp_path)
    Path("runs").mkdir()
    Path("runs/RUN").symlink_to(finished)
    names: dict[str, Any] = {}
    for block in blocks(page.read_text()):
        if block.title:
            Path(block.title).write_text(block.text + "\n")
        elif block.language == "python" and not block.reason:
            exec(compile(block.text, f"{page.name}: a block of Python", "exec"), names)
        for command in block.commands():
            if command.program == "tap-agent" and not block.reason:
                arguments = [*command.arguments, *tiny(command, server)]
                assert tap(*arguments) == Exit.OK, arguments
            else:
                check(command)


def tiny(command: Command, server: ChatServer) -> list[str]:
    """What is added to a command of a page, so that it takes a second or two; flags that come later win."""
    name = command.arguments[0]
    added = list(SMALL.get(name, []))
    if name in ("run", "chat"):
        added += ["--llm", "scripted", "--base-url", server.url]
    return added + (OF_ONE_NETWORK if name == "run" and "--config" not in command.arguments else [])


def check(command: Command) -> None:
    """That a command which is not run could be: its program, its flags and its files exist."""
    match command.program:
        case "tap-agent":
            parse(command.arguments)
        case "python":
            assert (ROOT / command.arguments[0]).is_file(), command
        case program:
            assert program in OTHERS, command


def parse(arguments: tuple[str, ...], in_passing: bool = False) -> None:
    """Raises when the command or a flag does not exist, or a value is missing that is not spoken of `in_passing`."""
    group: Any = get_command(app)
    if arguments and arguments[0] in GROUPS:
        group, arguments = group.commands[arguments[0]], arguments[1:]
    if not arguments or arguments[0] == "--help":
        return
    assert arguments[0] in group.commands, arguments
    if "--help" not in arguments:
        group.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]), resilient_parsing=in_passing)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_calls_by_name_exists(page: Path) -> None:
    group: Any = get_command(app)
    commands = [*group.commands.values(), *(its for name in GROUPS for its in group.commands[name].commands.values())]
    known = {flag for command in commands for each in command.params for flag in [*each.opts, *each.secondary_opts]}
    for text in inline(page.read_text()):
        if text.startswith("tap-agent "):
            parse(tuple(text.replace("COMMAND", "run").split()[1:]), in_passing=True)
        for flag in re.findall(r"(?<!\S)--[a-z][a-z-]+", text):
            assert flag in known | FOREIGN_FLAGS | {"--help"}, text
        if re.match(r"(tap_agent|tap_eval|graphs|agents|tools|prompts|examples|benchmarks|docs|tests)/\S+\.\w+$", text):
            assert "NAME" in text or (ROOT / text).exists(), text


def test_the_drawing_is_that_of_the_graph() -> None:
    def nothing(*_: object) -> Any:
        raise AssertionError("a drawing opens nothing")

    drawn = Search(nothing, SearchSettings(), nothing, nothing, nothing).graph().compile().get_graph().draw_mermaid()
    page = (ROOT / "docs/how-it-works.md").read_text()
    (shown,) = [block.text for block in blocks(page) if block.language == "mermaid"]
    assert shown.strip() == drawn.strip(), f"docs/how-it-works.md should draw\n\n{drawn}"


def test_every_exit_code_has_a_line() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\w+) \| .+ \| (.*) \|$", text, re.MULTILINE)
    assert {(int(code), name) for code, name, _ in rows} == {(code.value, code.name.lower()) for code in Exit}
    assert all(what.strip() for *_, what in rows)


def test_the_site_builds_with_every_setting_in_its_tables(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "settings" / "index.html").read_text()
    for name in (*Settings.model_fields, *NetworkSettings.model_fields):
        row = re.search(rf"<td><code>{name}</code></td>(.*?)</tr>", page, re.DOTALL)
        assert row, name
        cells = re.findall(r"<td>(.*?)</td>", row[1], re.DOTALL)
        assert cells[-1], f"{name} has neither a docstring nor a help text"
    assert "<code>weight_kurtosis</code>" in (tmp_path / "proxy" / "index.html").read_text()
    searched = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert [each for each in searched["docs"] if "weight_kurtosis" in each["text"]]


@pytest.mark.parametrize("page", ["settings", "proxy", "reliability"])
def test_tables_are_those_of_the_code(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert text.count("<!-- table: ") == {"settings": 4, "proxy": 3, "reliability": 7}[page]
    assert text == filled(text), "run `python -m docs.generated`"


def test_the_command_that_contributors_are_told_writes_the_tables(tmp_path: Path) -> None:
    (told,) = re.findall(r"`python (-m docs\S+)`", (ROOT / "CONTRIBUTING.md").read_text())
    for each in ROOT.iterdir():
        if each.is_dir() and each.name != "docs":
            (tmp_path / each.name).symlink_to(each)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    page = tmp_path / "docs" / "reliability.md"
    page.write_text(page.read_text().replace("| command |", "| what was typed |"))
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *told.split()], cwd=tmp_path, env=bare, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert page.read_text() == (ROOT / "docs" / "reliability.md").read_text()
