"""The forms that start and resume a run: their fields are settings that have a flag, and go to the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tap_agent.settings.fields import CONFIG, Setting, flagged


def fields(command: str, given: Mapping[str, str]) -> list[dict[str, Any]]:
    """The fields of the form for `run` or `resume`, in their order.

    Each with its name, which is that of the flag, its label and help, what is taken when it is left empty, what was
    given before, whether it is a number, and whether it is shown without asking.
    """
    settings = [setting for setting in flagged(command) if setting.flag.label]
    found = [_field(setting, given) for setting in settings]
    if command == "run":
        config = {"name": "config", "label": "Config", "help": CONFIG, "default": "", "given": given.get("config", "")}
        found.append({**config, "step": "", "common": False})
    labels = {field["name"]: field["label"] for field in found}
    for field in found:
        told = re.sub(r"--([a-z-]+)", lambda option: f"“{labels.get(option[1], option[0])}”", field["help"])
        field["help"] = told.replace("flags", "fields")
    return found


def _field(setting: Setting, given: Mapping[str, str]) -> dict[str, Any]:
    default = setting.field.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)
    return {
        "name": setting.option,
        "label": setting.flag.label,
        "help": setting.help,
        "default": shown,
        "given": given.get(setting.option, ""),
        "step": {int: "1", float: "any"}.get(setting.kind, ""),
        "common": setting.flag.common,
    }


def filled(command: str, form: Mapping[str, str]) -> dict[str, str]:
    """What was given in the fields of a form, those left empty left out."""
    names = [field["name"] for field in fields(command, {})]
    return {name: form[name].strip() for name in names if form.get(name, "").strip()}


def arguments(given: Mapping[str, str]) -> list[str]:
    """The same as flags."""
    return [f"--{name}={value}" for name, value in given.items()]
