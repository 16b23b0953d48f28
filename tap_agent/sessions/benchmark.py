"""A benchmark of allocations: measured once, and anything that foretells them held against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tap_agent.sessions.allocation import AllocationMistake
from tap_agent.sessions.apply import Watch
from tap_agent.sessions.resources import Resources
from tap_agent.sessions.subject import ProxySubject, read_subject
from tap_eval.baselines.baselines import RULES, losses
from tap_eval.benchmark import benchmark
from tap_eval.benchmark.benchmark import Benchmark
from tap_eval.benchmark.correlation import Correlation, correlate, expected_losses
from tap_eval.mistake import BenchmarkMistake, BitsMistake, ProxyMistake
from tap_eval.proxies.proxy import Rejection
from tap_eval.proxies.published import NAMES
from tap_eval.quantization.quantizer import LayerBits
from tools.evaluation import sensitivities
from tools.sandbox import Sandbox

_SEED = 0
"""of the bootstrap, which is the same for all"""


def build(
    resources: Resources, path: Path, least: float, most: float, strata: int, count: int, watch: Watch
) -> list[str]:
    """Measures the network of `resources`, into a file at `path`; a sentence for each baseline that it cannot have.

    Raises `BenchmarkMistake` where there are several.
    """
    benches = resources.benches
    if len(benches) > 1:
        raise BenchmarkMistake(
            f"{', '.join(bench.name for bench in benches)} are {len(benches)} networks: a file holds one; give "
            "--network, or a config with one."
        )
    (bench,) = benches
    left_out: list[str] = []

    def foretell() -> dict[str, list[list[float]]]:
        watch.begin(f"what baselines foretell of {bench.name}", len(RULES))
        found = losses(bench, resources.settings.seed, left_out.append, watch.advance)
        watch.begin(f"measuring allocations of {bench.name}", count)
        return found

    def advance(done: int) -> None:
        for _ in range(done):
            watch.advance()

    edges = np.linspace(least, most, strata + 1).tolist()
    benchmark.write(path, benchmark.build(bench, edges, count, resources.settings.seed, foretell, advance))
    return left_out


@dataclass(frozen=True)
class Held:
    """How well a rule foretells what allocations are worth, by KL divergence and by top-1."""

    name: str
    kl: Correlation
    top1: Correlation


def hold(names: Sequence[str], against: Benchmark, sandbox: Sandbox) -> list[Held]:
    """Each of `names`, a proxy as `apply` takes it or a baseline, or without any all baselines; the best first.

    Raises `ProxyMistake` where one is neither, or a proxy fails on the network's features.
    """
    foretold = {name: _foretold(name, against, sandbox) for name in names or against.about.foretold}
    strata = [entry.stratum for entry in against.entries]
    kl = [entry.kl for entry in against.entries]
    wrong = [-float(entry.correct) for entry in against.entries]
    found = [
        Held(name, correlate(its, kl, strata, _SEED), correlate(its, wrong, strata, _SEED))
        for name, its in foretold.items()
    ]
    return sorted(found, key=lambda each: -each.kl.spearman.value)


def _foretold(name: str, against: Benchmark, sandbox: Sandbox) -> list[float]:
    """What each allocation loses by a rule."""
    about = against.about
    if name in about.foretold:
        rows = about.foretold[name]
        tables: list[dict[LayerBits, float]] = [dict(zip(about.choices, row, strict=True)) for row in rows]
        return [
            sum(table[bits] for table, bits in zip(tables, entry.allocation.weights, strict=True))
            for entry in against.entries
        ]
    if name in RULES:
        raise ProxyMistake(
            f"'{name}' foretells no allocation but its own, or was not to be had on {about.network}: give a proxy, or "
            f"a baseline that does: {', '.join(about.foretold)}."
        )
    kinds = (
        f"give a proxy's .py file, a published proxy ({', '.join(NAMES)}), a run's folder, or a baseline "
        f"({', '.join(about.foretold)})."
    )
    try:
        subject = read_subject(name)
    except (ProxyMistake, AllocationMistake, BitsMistake) as mistake:
        why = f" ({mistake.__cause__})" if isinstance(mistake.__cause__, OSError) else ""
        raise ProxyMistake(f"'{name}' is no proxy{why}: {kinds}") from mistake
    if not isinstance(subject, ProxySubject):
        raise ProxyMistake(f"'{name}' is no proxy: {kinds}")
    scores = sensitivities(
        subject.code, about.features, about.task, [layer.out_channels for layer in about.layers], sandbox
    )
    if isinstance(scores, Rejection):
        raise ProxyMistake(f"{name} fails on {about.network} ({scores.failure}): {scores.message}")
    found: list[float] = expected_losses(scores, against.noise).tolist()
    return found
