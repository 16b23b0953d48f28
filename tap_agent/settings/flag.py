"""What a setting says of itself to those who ask for it: the command line, and the form of the page."""

from __future__ import annotations

from dataclasses import dataclass

NETWORK, BITS, SEARCH, MODEL = "Network and images", "Bits and budget", "Search", "Language model and sandbox"
"""the panels of `--help`"""


@dataclass(frozen=True)
class Flag:
    """Of a setting that has a flag, whose help is the first sentence of the setting's docstring."""

    panel: str
    commands: str
    """those that take it, as `run apply`"""
    name: str = ""
    """of the flag, where it is not that of the setting"""
    usage: bool = False
    """whether a value beside its choices or beyond its bounds is a mistake of usage, rather than of the config"""
    label: str = ""
    """of its field on the page, which takes text or a number; without one it has none"""
    common: bool = False
    """whether the page shows the field without asking"""
