"""Proxies that come with the program: each a plain file, that runs in the sandbox as any other does."""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files
from typing import Any

from tap_eval.proxies.proxy import Proxy

NAMES = ("paper", "channel_noise")
"""what `tap-agent apply` and `quantize` take"""

FOUND_ON = {"paper": "", "channel_noise": "cifar_resnet20"}
"""the network that each was found on; "" where that is not known"""


def published(name: str) -> Proxy:
    """The one called `name`: its docstring as thought, and its code."""
    return Proxy((module(name).__doc__ or "").strip(), (files(__name__) / f"{name}.py").read_text())


def module(name: str) -> Any:
    """The same as a module, which has a function `sensitivity(layers, task)`."""
    return import_module(f"{__name__}.{name}")
