"""What works on this machine: each part is tried, not only looked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from agents.embedded import EMBEDDED
from agents.models import PROVIDERS, LanguageModel
from tap_eval.device import CPU, called, chosen, found
from tap_eval.images.sources import open_source
from tap_eval.mistake import Mistake
from tap_eval.networks.digits import load_digits_cnn
from tap_eval.quantization.integer import exact
from tools.sandbox import MontySandbox, SandboxError


@dataclass(frozen=True)
class Finding:
    """One part: whether it works, and what was found or what to do next."""

    works: bool
    text: str


def examine(cache: Path) -> list[Finding]:
    """Tries every part that a default run needs."""
    parts: dict[str, Callable[[], str]] = {
        "device": _device,
        "sandbox": _sandbox,
        "language model": _language_model,
        "images": _images,
        "network": lambda: _network(cache),
        "cache": lambda: _cache(cache),
    }
    return [_try(name, part) for name, part in parts.items()]


def _try(name: str, part: Callable[[], str]) -> Finding:
    try:
        return Finding(True, f"{name}: {part()}")
    except (Mistake, SandboxError, OSError, ImportError) as error:
        return Finding(False, f"{name}: {error}")


def _device() -> str:
    there = found()
    others = [called(each) for each in there if each != CPU]
    auto = ", ".join(map(str, chosen("auto", there)))
    path = "in 8-bit integers" if exact() else "on the simulated path, since bytes cannot be multiplied exactly here"
    return (
        f"CPU with {torch.get_num_threads()} threads, torch {torch.__version__}, measures {path}; "
        f"{', '.join(others) or 'no GPU, none needed'}; --device auto takes {auto}"
    )


def _sandbox() -> str:
    with MontySandbox() as sandbox:
        guards = sandbox.guards()
        answer = sandbox.run("def f(x): return x + 1", "f(1)", {})
    if answer != 2:
        raise SandboxError(f"it computes 1 + 1 = {answer}: install pydantic-monty again.")
    missing = [name for name, held in guards.items() if not held]
    return "Monty answers" + (
        f"; not guarded by the kernel: {', '.join(missing)}" if missing else ", every guard holds"
    )


def _language_model() -> str:
    LanguageModel(EMBEDDED).check()
    keys = [provider.key for provider in PROVIDERS.values() if os.environ.get(provider.key)]
    return f"the embedded model runs; keys for others in the environment: {', '.join(keys) or 'none'}"


def _images() -> str:
    return f"digits, {len(open_source('digits').labels):,} images"


def _network(cache: Path) -> str:
    load_digits_cnn(cache)
    return f"the digits CNN is trained, in {cache}"


def _cache(cache: Path) -> str:
    probe = cache / ".probe"
    cache.mkdir(parents=True, exist_ok=True)
    probe.write_text("")
    probe.unlink()
    return f"{cache} can be written"
