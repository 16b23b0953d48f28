"""The settings that have a flag, and what there is to know of them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, get_args

from pydantic.fields import FieldInfo

from tap_agent.settings.flag import BITS, NETWORK, Flag
from tap_agent.settings.model import NetworkSettings, Settings

CONFIG = "YAML file of settings; flags win over it."
"""what --config is for, which is no setting"""

_OF_A_SESSION = {"cache_llm", "prices", "call_seconds", "images_mib"}
"""settings that no figure depends on, beside those that `resume` takes"""
_FIGURED = {"networks", "device", "batch", "moments_mib", "seed"}
"""settings on which figures depend, beside those of networks, images and bits"""


class Setting(NamedTuple):
    """One setting of a run or of its network."""

    name: str
    """in a config"""
    field: FieldInfo
    flag: Flag

    @property
    def option(self) -> str:
        """The flag as it is written, without its dashes."""
        return self.flag.name or self.name.replace("_", "-")

    @property
    def help(self) -> str:
        """The first sentence of its docstring."""
        return re.split(r"(?<=\.)\s", self.field.description or "", maxsplit=1)[0]

    @property
    def kind(self) -> Any:
        """Its type, without the None of a setting that may be left open."""
        open_to = [kind for kind in get_args(self.field.annotation) if kind is not type(None)]
        return open_to[0] if type(None) in get_args(self.field.annotation) else self.field.annotation

    @property
    def bounds(self) -> dict[str, float]:
        """The least and the greatest that it takes, as `min` and `max`, where it has such."""
        names = {"ge": "min", "le": "max"}
        return {
            names[name]: getattr(each, name)
            for each in self.field.metadata
            for name in names
            if getattr(each, name, None) is not None
        }


def flagged(command: str) -> list[Setting]:
    """The settings that a command has flags for, those of the network first."""
    fields = NetworkSettings.model_fields | Settings.model_fields
    found = [(name, field, flag_of(field)) for name, field in fields.items()]
    return [Setting(name, field, flag) for name, field, flag in found if flag and command in flag.commands.split()]


def of_a_session() -> set[str]:
    """Names of the settings that a run may go on with others of."""
    return {setting.name for setting in flagged("resume")} | _OF_A_SESSION


def figured(settings: Settings) -> dict[str, Any]:
    """Those settings on which the figures of given bits depend, as a config has them; none is of a language model."""
    flags = {name: flag_of(field) for name, field in Settings.model_fields.items()}
    names = {name for name, flag in flags.items() if flag and flag.panel in (NETWORK, BITS)} | _FIGURED
    found = settings.model_dump(
        mode="json", include=names - {"budget"}, exclude={"networks": {"__all__": {"budget", "latencies"}}}
    )
    return {name: found[name] for name in Settings.model_fields if name in found}


def flag_of(field: FieldInfo) -> Flag | None:
    """What a setting says of its flag."""
    return next((each for each in field.metadata if isinstance(each, Flag)), None)
