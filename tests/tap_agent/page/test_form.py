"""The forms of the page, which give what the command line takes."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command

from tap_agent.commands.app import app
from tap_agent.page.form import arguments, fields, filled


@pytest.mark.parametrize("command", ["run", "resume"])
def test_every_field_is_a_flag_and_shows_what_the_flag_does(command: str) -> None:
    group: Any = get_command(app)
    parsed = group.commands[command]
    given = {field["name"]: f" {field['default'] or 1} " for field in fields(command, {})}
    place = [] if command == "run" else ["runs/one"]
    context = parsed.make_context(command, [*place, *arguments(filled(command, given))])
    assert {"max_cost", "max_calls", "max_minutes"} <= {name for name, value in context.params.items() if value}
    assert (context.params.get("seed"), context.params.get("bits")) == (
        (0, "2,4,8") if command == "run" else (None,) * 2
    )
    assert [field["given"].strip() for field in fields(command, given)] == [text.strip() for text in given.values()]
    assert all(field["help"] and "--" not in field["help"] for field in fields(command, {}))
