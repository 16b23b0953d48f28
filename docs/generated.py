"""Tables of the pages that are made from the code: this program writes them, and a test sees that it was run."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agents.models import OTHER, PROVIDERS
from tap_agent.exit import Exit
from tap_agent.settings.fields import Setting, flag_of
from tap_agent.settings.model import NetworkSettings, Settings
from tap_eval.baselines.baselines import RULES
from tap_eval.images.images import Transform
from tap_eval.proxies.features import METADATA, STATISTICS, TASK
from tests.faults.plans import PLANS


def filled(markdown: str) -> str:
    """A page with its tables as they are now."""
    for name in re.findall(r"<!-- table: ([\w ]+) -->", markdown):
        markdown = put(markdown, f"table: {name}", TABLES[name]())
    return markdown


def put(markdown: str, block: str, content: str) -> str:
    """A page with `content` between the comment that names a block and one that ends it.

    Raises `ValueError` where there is none, or there are several.
    """
    begin = f"<!-- {block} -->\n"
    text, found = re.subn(
        f"{begin}.*?<!-- end -->", lambda _: f"{begin}\n{content}\n\n<!-- end -->", markdown, flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"the page has {found} times {begin.strip()}, and not once")
    return text


def keys() -> str:
    """A line a variable that holds the key of a language model."""
    providers: dict[str, list[str]] = {}
    for name, provider in PROVIDERS.items():
        providers.setdefault(provider.key, []).append(f"`{name}:`")
    providers[OTHER.key].append("a server by its URL")
    return _table(("variable", "key of"), [(f"`{key}`", ", ".join(of)) for key, of in providers.items()])


def baselines() -> str:
    """A line a rule: its name, its row, its formula, what it sees, where it is from, and whether it is always there."""
    rows = [
        (f"`{name}`", rule.label, f"`{rule.equation}`", ", ".join(rule.sees) or "nothing", rule.source,
         "yes" if rule.fast else "")
        for name, rule in RULES.items()
    ]  # fmt: skip
    return _table(("name", "row", "bits b_i of layer i", "sees", "source", "fast"), rows)


def settings(model: type[BaseModel]) -> str:
    """A line a setting: its name in a config, its flag, what it takes, its default and its meaning."""
    rows = [
        (f"`{name}`", _flag(name, field), _takes(field), _default(field), (field.description or "").replace("\n", " "))
        for name, field in model.model_fields.items()
    ]
    return _table(("in a config", "flag", "takes", "default", "what it is"), rows)


def plans(kind: str) -> str:
    """A line a plan: what goes wrong, the command, what it says, its exit code, and what is kept."""
    rows = [
        (each.what, f"`tap-agent {each.command}`", _said(each.sees), _ending(each.exit), each.kept)
        for each in PLANS if each.kind == kind
    ]  # fmt: skip
    return _table(("what goes wrong", "command", "it says", "exit code", "what is kept"), rows)


def _ending(code: Exit | Signals) -> str:
    return f"that of {code.name}" if isinstance(code, Signals) else f"{code.value} {code.name.lower()}"


def _said(part: str) -> str:
    return part and f"… {part.replace('`', '')} …"


def _flag(name: str, field: FieldInfo) -> str:
    flag = flag_of(field)
    return f"`--{Setting(name, field, flag).option}`" if flag else ""


WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}
BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}


def _takes(field: FieldInfo) -> str:
    """What a setting accepts, in words."""
    limits = [words.format(getattr(each, name)) for each in field.metadata for name, words in BOUNDS.items()
              if hasattr(each, name)]  # fmt: skip
    return " ".join([_kind(field.annotation), *limits])


def _kind(annotation: Any) -> str:
    parts = [part for part in typing.get_args(annotation) if part not in (type(None), ...)]
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        kind = _kind(parts[0])
        return f"list of {kind}" if "`" in kind else f"list of {kind}s"
    if parts and origin is not dict:
        return " or ".join(map(_kind, parts))
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return WORDS.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple) and any(isinstance(part, BaseModel) for part in value):
        return "one, with its defaults"
    return "" if value is None else f"`{json.dumps(value)}`"


def _names(meanings: Mapping[str, str]) -> Callable[[], str]:
    return lambda: _table(("name", "what it is"), [(f"`{name}`", text) for name, text in meanings.items()])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "settings": lambda: settings(Settings),
    "network settings": lambda: settings(NetworkSettings),
    "transform settings": lambda: settings(Transform),
    "metadata": _names(METADATA),
    "statistics": _names(STATISTICS),
    "task": _names(TASK),
    "keys": keys,
    **{f"plans {kind}": partial(plans, kind) for kind in dict.fromkeys(each.kind for each in PLANS)},
    "baselines": baselines,
}

if __name__ == "__main__":
    for page in Path(__file__).parent.glob("*.md"):
        page.write_text(filled(page.read_text()))
