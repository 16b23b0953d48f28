"""The flags of commands, made from the settings that they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

import typer

from tap_agent.settings.fields import CONFIG, Setting, flagged

ConfigOption = Annotated[Path | None, typer.Option("--config", help=CONFIG)]
Command = TypeVar("Command", bound=Callable[..., None])


def takes_settings(command: Command) -> Command:
    """Gives a command the flags of its settings: keywords with the names of the settings, None where not given.

    It is to have a parameter `**flags`, which they take the place of.
    """
    return takes_settings_of(command.__name__)(command)


def takes_settings_of(name: str, but: Collection[str] = ()) -> Callable[[Command], Command]:
    """The same with the settings that the command called `name` has flags for, `but` some."""

    def given(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [*own, *(_parameter(each) for each in flagged(name) if each.name not in but)]
        command.__dict__["__signature__"] = signature.replace(parameters=parameters)
        return command

    return given


def _parameter(setting: Setting) -> inspect.Parameter:
    """What Typer makes an option of; lists and mappings are text, which the settings read."""
    flag, kind = setting.flag, setting.kind
    literal = get_origin(kind) is Literal
    named = [f"--{flag.name}"] if flag.name else []
    bounds: dict[str, Any] = setting.bounds if flag.usage else {}
    option = typer.Option(None, *named, help=setting.help, rich_help_panel=flag.panel, **bounds)
    plain = kind in (str, int, float, bool, Path) or (literal and flag.usage)
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=(kind if plain else str) | None
    )
