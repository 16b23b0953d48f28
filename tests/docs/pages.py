"""The code blocks of a Markdown page, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"(`{3,})(\w*)\s*(?:title=\"([^\"]+)\")?\s*$")
_REASON = re.compile(r"<!-- not run: (.+?) -->")
_VARIABLE = re.compile(r"([A-Z_]+)=(.*)")


@dataclass(frozen=True)
class Block:
    """A block of code: its language if it names one, the file that it is, and why it is not run."""

    language: str
    title: str
    text: str
    reason: str

    def commands(self) -> Iterator[Command]:
        """The commands of a block of shell; an indented block is one when its first word says so."""
        if self.language not in ("", "bash"):
            return
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            variables: dict[str, str] = {}
            while words and (match := _VARIABLE.fullmatch(words[0])):
                variables[match[1]] = match[2]
                words = words[1:]
            if words:
                yield Command(words[0], tuple(words[1:]), variables)


@dataclass(frozen=True)
class Command:
    """A program with its arguments and the variables before it."""

    program: str
    arguments: tuple[str, ...]
    variables: dict[str, str]


def blocks(text: str) -> Iterator[Block]:
    """Every fenced and every indented block of a page, in order; a comment speaks of the next block."""
    lines = iter([*text.splitlines(), ""])
    reason, before = "", ""
    for line in lines:
        if match := _REASON.fullmatch(line.strip()):
            reason = match[1]
        elif fence := _FENCE.match(line):
            inside = list(iter(lambda: next(lines), fence[1]))
            yield Block(fence[2], fence[3] or "", "\n".join(inside), reason)
            reason = ""
        elif line.startswith("    ") and not before.strip():
            inside = [line[4:]]
            while (line := next(lines)).startswith("    "):
                inside.append(line[4:])
            yield Block("", "", "\n".join(inside), reason)
            reason = ""
        before = line


def inline(text: str) -> list[str]:
    """What stands between single backticks, outside blocks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
