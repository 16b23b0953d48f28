"""The words that agents are given: one Jinja template a file, in which a missing value is an error."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from prompts.emphases import EMPHASES


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("prompts", "templates"),
        undefined=StrictUndefined,
        autoescape=False,  # the readers are language models
        auto_reload=False,  # or each use looks whether the file has changed
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["emphases"] = EMPHASES
    return environment


def render(template: str, **values: Any) -> str:
    """The text of `templates/TEMPLATE.md.jinja`; raises `jinja2.UndefinedError` for a value not given."""
    return _environment().get_template(f"{template}.md.jinja").render(values).strip()
