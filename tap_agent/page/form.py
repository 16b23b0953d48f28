"""The forms that start and resume a run: their fields are flags of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from tap_agent.settings import flags
from tap_agent.settings.model import NetworkSettings, Settings

FIELDS: dict[str, tuple[str, Any]] = {
    "network": ("Network", flags.NetworkOption),
    "weights": ("Weights", flags.WeightsOption),
    "images": ("Images", flags.ImagesOption),
    "calibration": ("Calibration images", flags.CalibrationOption),
    "budget": ("Budget", flags.BudgetOption),
    "bits": ("Bits", flags.BitsOption),
    "generations": ("Generations", flags.GenerationsOption),
    "population": ("Population", flags.PopulationOption),
    "llm": ("Language model", flags.LLMOption),
    "base-url": ("Base URL", flags.BaseURLOption),
    "seed": ("Seed", flags.SeedOption),
    "config": ("Config", flags.ConfigOption),
    "search": ("Search images", flags.SearchRowsOption),
    "test": ("Test images", flags.TestRowsOption),
    "draws": ("Calibration draws", flags.DrawsOption),
    "channel-groups": ("Channel groups", flags.GroupsOption),
    "racing": ("Racing", flags.RacingOption),
    "max-cost": ("Most cost", flags.MaxCostOption),
    "max-calls": ("Most calls", flags.MaxCallsOption),
    "max-minutes": ("Most minutes", flags.MaxMinutesOption),
}
"""the flags of `tap-agent run` that the page has a field for, with its label"""
COMMON = 11
"""of the fields, shown without asking; the others are behind "More settings" """
LIMITS = ("max-cost", "max-calls", "max-minutes")
"""of the fields, those that a run may be resumed with"""


def fields(given: Mapping[str, str]) -> list[dict[str, Any]]:
    """The fields of the form: name, label, help, what is taken when it is left empty, and what was given before."""
    defaults = {
        **NetworkSettings().model_dump(),
        **{name.replace("_", "-"): value for name, value in Settings().model_dump().items()},
        "config": None,
        "draws": Settings().calibration_draws,
        "bits": ",".join(map(str, Settings().bits)),
    }
    found: list[dict[str, Any]] = []
    for name, (label, option) in FIELDS.items():
        kind, about = get_args(option)
        found.append(
            {
                "name": name,
                "label": label,
                "help": re.sub(r"--([a-z-]+)", lambda flag: f"“{FIELDS[flag[1]][0]}”", about.help).replace(
                    "flags", "fields"
                ),
                "default": "" if defaults[name] is None else str(defaults[name]),
                "given": given.get(name, ""),
                "step": {int: "1", float: "any"}.get(get_args(kind)[0], ""),
            }
        )
    return found
