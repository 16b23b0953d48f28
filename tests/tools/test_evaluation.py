"""Scoring and allocating what a proxy says, above all when it says something odd or hostile."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.allocation.latency import Latencies
from tap_eval.images.images import Splits
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.networks.digits import DigitsCNN
from tap_eval.proxies.proxy import Failure, Rejection
from tools.evaluation import Known, Scored, score
from tools.sandbox import MontySandbox, forbidden

SENSITIVITY = "def sensitivity(layers, task):\n    "
SCORES = "return [layer['weight_std'] for layer in layers]\n"
ALLOCATE = "def allocate(scores, layers, budget):\n    "


def scored(code: str, benches: list[Bench], sandbox: MontySandbox) -> Scored:
    found = score(code, benches, sandbox)
    assert isinstance(found, Scored)
    return found


def refused(code: str, bench: Bench, sandbox: MontySandbox) -> Rejection:
    found = score(code, [bench], sandbox)
    assert isinstance(found, Rejection)
    return found


def test_a_proxy_reaches_nothing_beside_what_it_is_given(bench: Bench, sandbox: MontySandbox) -> None:
    for name in ("cases", "c", "benches", "_result"):
        found = refused(f"{SENSITIVITY}{name}.clear()\n    {SCORES}", bench, sandbox)
        assert found.failure is Failure.ERROR
        assert name in found.message


def test_what_a_proxy_does_to_its_inputs_stays_with_that_network(
    bench: Bench, sandbox: MontySandbox, tmp_path: Path
) -> None:
    spoiling = f"{SENSITIVITY}scores = {SCORES[7:]}    layers.clear()\n    task.clear()\n    return scores\n"
    network, ledger = bench.prepared.network, Ledger(tmp_path / "ledger.sqlite")
    benches = [bench, Bench("again", network, bench.splits, bench.task, ledger)]
    assert scored(spoiling, benches, sandbox).scores == scored(SENSITIVITY + SCORES, benches, sandbox).scores
    assert len(bench.features) == 10


def test_an_allocator_of_its_own_makes_another_proxy_unless_its_bits_are_the_same(
    bench: Bench, sandbox: MontySandbox
) -> None:
    known = Known(dict.fromkeys(scored(SENSITIVITY + SCORES, [bench], sandbox).prints, "p000"))
    own = scored(f"{SENSITIVITY}{SCORES}{ALLOCATE}return [2 for layer in layers]\n", [bench], sandbox)
    assert own.allocations[0].weights == (2,) * 10
    assert known.same_result(own) is None
    again = scored(f"{SENSITIVITY}{SCORES}{ALLOCATE}return [2] * len(layers)\n", [bench], sandbox)
    twin = Known(dict.fromkeys(own.prints, "p001")).same_result(again)
    assert twin is not None
    assert twin.failure is Failure.DUPLICATE


@pytest.mark.parametrize(
    ("bits", "failure"),
    [
        ("['x' * 4000000] * len(layers)", Failure.WRONG_SHAPE), ("[True] * len(layers)", Failure.WRONG_SHAPE),
        ("[[False] * x['out_channels'] for x in layers]", Failure.WRONG_SHAPE),
        ("[0] * len(layers)", Failure.WRONG_SHAPE),
        ("[2.0] * len(layers)", Failure.WRONG_SHAPE), ("[3] * len(layers)", Failure.WRONG_SHAPE),
        ("[-2] * len(layers)", Failure.WRONG_SHAPE), ("[2]", Failure.WRONG_SHAPE), ("None", Failure.WRONG_SHAPE),
        ("[8] * len(layers)", Failure.OVER_BUDGET), ("[1 / 0]", Failure.ERROR),
    ],
)  # fmt: skip
def test_bits_that_are_none_are_refused_in_a_short_sentence(
    bits: str, failure: Failure, bench: Bench, sandbox: MontySandbox
) -> None:
    found = refused(f"{SENSITIVITY}{SCORES}{ALLOCATE}return {bits}\n", bench, sandbox)
    assert found.failure is failure
    assert len(found.message) <= 1000


def test_an_allocator_of_a_proxy_may_give_channels_their_bits(
    channel_bench: Bench, bench: Bench, sandbox: MontySandbox
) -> None:
    halves = "[[2] * (x['out_channels'] // 2) + [4] * (x['out_channels'] - x['out_channels'] // 2) for x in layers]"
    found = scored(f"{SENSITIVITY}{SCORES}{ALLOCATE}return {halves}\n", [channel_bench], sandbox).allocations[0]
    for layer, bits in zip(channel_bench.layers, found.weights, strict=True):
        half = layer.out_channels // 2
        assert bits == (2,) * half + (4,) * (layer.out_channels - half)
    same = scored(
        f"{SENSITIVITY}{SCORES}{ALLOCATE}return [[2] * x['out_channels'] for x in layers]\n", [bench], sandbox
    )
    assert same.allocations[0].weights == (2,) * 10
    for bits, where, said in [
        (halves, bench, "2 different bits; 1 are allowed"),
        ("[[2, 4]] * len(layers)", channel_bench, "layer 0 has 16 output channels; allocate gave it 2 bits"),
        ("[[3] * x['out_channels'] for x in layers]", channel_bench, "layer 0 the bits 3; it may take [2, 4, 8]"),
        ("[[]] * len(layers)", channel_bench, "gave it 0 bits"),
        (halves.replace("[2]", "[8]"), channel_bench, "above the budget"),
    ]:
        assert said in refused(f"{SENSITIVITY}{SCORES}{ALLOCATE}return {bits}\n", where, sandbox).message


def test_an_allocator_of_a_proxy_is_told_what_a_budget_in_bytes_leaves_for_weights(
    network: DigitsCNN, splits: Splits, cache: Path, sandbox: MontySandbox
) -> None:
    task = Task(Choices(), Budget.parse("6.6KB"))
    bench = Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"))
    most = "max([bits for bits in [2, 4, 8] if bits * sum([x['params'] for x in layers]) <= budget['limit']])"
    found = scored(f"{SENSITIVITY}{SCORES}{ALLOCATE}return [{most}] * len(layers)\n", [bench], sandbox)
    assert found.allocations[0].weights == (4,) * 10
    assert bench.size(found.allocations[0]).total == 6447
    assert (
        "bytes above the budget of 6.6KB"
        in refused(f"{SENSITIVITY}{SCORES}{ALLOCATE}return [8] * len(layers)\n", bench, sandbox).message
    )


def test_an_allocator_of_a_proxy_is_told_what_layers_cost_in_time(
    network: DigitsCNN, splits: Splits, cache: Path, sandbox: MontySandbox, bench: Bench, tmp_path: Path
) -> None:
    rows = [f"{layer.name},{bits},8,{0.001 * bits}" for layer in bench.layers for bits in (2, 4, 8)]
    (tmp_path / "device.csv").write_text("\n".join(["layer,weight_bits,activation_bits,ms", *rows]))
    task = Task(Choices(), Budget.parse("45us"), latencies=Latencies.read(tmp_path / "device.csv"))
    timed = Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"))
    most = "max([b for b in [2, 4, 8] if sum([c[str(b)] for c in budget['costs']]) <= budget['limit']])"
    found = scored(f"{SENSITIVITY}{SCORES}{ALLOCATE}return [{most}] * len(layers)\n", [timed], sandbox)
    assert found.allocations[0].weights == (4,) * 10
    assert (
        "the allocation is 0.035 ms above the budget of 45us"
        in refused(f"{SENSITIVITY}{SCORES}{ALLOCATE}return [8] * len(layers)\n", timed, sandbox).message
    )


def test_scores_far_apart_are_told_from_each_other(bench: Bench, sandbox: MontySandbox) -> None:
    for far in ("1e-308", "-1.7e308"):
        up, down = (
            scored(f"{SENSITIVITY}return [{far}] + [{values} * 1e300 for i in range(9)]\n", [bench], sandbox)
            for values in ("(10 + i)", "(19 - i)")
        )
        assert Known({up.prints[1]: "p000"}).same_result(down) is None


def test_a_number_too_long_to_be_printed_is_refused(bench: Bench, sandbox: MontySandbox) -> None:
    found = refused(f"{SENSITIVITY}x = 0x{'f' * 3600}\n    {SCORES}", bench, sandbox)
    assert found.failure is Failure.FORBIDDEN
    assert "14,400 bits" in found.message


def test_odd_code_makes_no_warning_here() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert forbidden(f"{SENSITIVITY}return [1if x else 2for x in layers]") is None
    assert warned == []
