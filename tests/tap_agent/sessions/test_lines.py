"""Lines of tables: what searches depend on and are compared with, and what rows say of how they were measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphs.state import Candidate
from tap_agent.runs.result import MeasuredTop1, Result, Row
from tap_agent.sessions.costs import _Cost
from tap_agent.sessions.rows import _protocol, calibrated, named
from tap_agent.sessions.searches import _compared, _depends, _line, _Searches
from tap_agent.sessions.subject import ProxySubject
from tap_agent.settings.model import NetworkSettings, Settings
from tap_agent.settings.read import Given
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.images.images import Splits
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task
from tap_eval.networks.digits import DigitsCNN


def group(variant: str, network: NetworkSettings, *fitness: float) -> _Searches:
    """Searches of one proposal each."""
    made = _Searches(variant, network, Settings(networks=(network,)))
    top1 = MeasuredTop1(correct=1, count=2, top1=0.5, low=0, high=1)
    row = Row(
        label="TAP", kind="proxy", network="digits", bits=3, size_bytes=1, bops=1, search=None, test=top1, draws=[0.5],
        spread=0, kl_draws=[0.1],
    )  # fmt: skip
    for value in fitness:
        one = Candidate(name="p000", generation=0, template="mutation", parents=[], thought="", code="", fitness=value)
        result = Result(
            run="run", config={}, networks=[], generations=[], candidates=[one], best="p000", table=[row], seconds=1,
            measured=1,
        )  # fmt: skip
        made.results.append(result)
    made.line = _line(made, 2)
    return made


def test_searches_are_compared_with_those_of_the_same_network_and_budget() -> None:
    low, high = (NetworkSettings(budget=budget) for budget in ("2.5bit", "3.5bit"))
    unopened = _Searches("controller ratio", low, Settings())  # which raised before it had a line
    groups = [
        unopened,
        group("controller ratio", high, 0.7, 0.9),
        group("controller uniform", low, 0.5, 0.5),
        group("controller uniform", high, 0.8, 0.8),
    ]
    lines = [each.line for each in groups if each.line]
    found = [_compared(line, groups, "controller uniform").figures for line in lines]
    assert [each["reached"].values for each in found] == [(1,), (2,), (2,)]  # of the goals 0.8, 0.5 and 0.8
    assert ["until_change" in each for each in found] == [True, False, False]
    other = lines[0].model_copy(update={"kind": "proxy"})
    assert _compared(other, groups, "controller uniform") is other


def test_searches_in_which_nothing_lives_count_where_there_is_something_to_count() -> None:
    network = NetworkSettings()
    one, uniform = (group(variant, network, 0.5) for variant in ("controller ratio", "controller uniform"))
    one.settings = uniform.settings = Settings(networks=(network,), population=4, generations=1)
    failed = [
        Candidate(
            name=f"p00{place}",
            generation=0,
            template="initialization",
            parents=[],
            thought="",
            code="",
            failure="error",
        )
        for place in range(3)
    ]  # which a limit ended before the fourth
    one.dead.append(failed)
    line = _line(one, 2)
    assert line.figures["failed generation 0"].values == (0, 100)
    assert line.figures["fitness"].values == (0.5,)
    one.line = line
    compared = _compared(line, [one, uniform], "controller uniform").figures
    assert compared["until"].values == (1, 8)
    assert compared["reached"].values == (1,)


def test_what_a_search_depends_on(tmp_path: Path) -> None:
    answers, given = tmp_path / "answers.jsonl", tmp_path / "given.parquet"
    for file in (answers, given):
        file.write_text("one")
    settings = Settings(llm=f"replay:{answers}", worth=f"benchmark:{given}")
    name = _depends(settings, "content")
    session = {"max_calls": 3, "keep_checkpoints": "all", "cache_llm": True, "call_seconds": 9.0, "images_mib": 1}
    assert _depends(settings.model_copy(update={**session, "prices": {"a": (1.0, 2.0)}}), "content") == name
    for changed in ({"alpha": 0.5}, {"device": "cpu"}):
        assert _depends(settings.model_copy(update=changed), "content") != name
    assert _depends(settings, "other") != name
    for file in (answers, given):
        file.write_text("two")
        assert _depends(settings, "content") != name
        file.write_text("one")
    assert _depends(settings, "content") == name


def test_a_protocol_says_what_was_measured(network: DigitsCNN, splits: Splits, cache: Path) -> None:
    asked = Settings()
    task = Task(Choices(), Budget.parse("3bit"), sums="float")
    bench = Bench("digits", network, splits, task, Ledger(cache / "ledger.sqlite"), notes=["digits is as it is"])
    protocol = _protocol(asked, bench)
    assert "sums float" in protocol
    assert "attention" not in protocol  # there is none to be in integers
    assert "digits is as it is" in protocol


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "16 calibration images"),
        ("distilled", "16 distilled calibration images, which count as images"),
        ("parquet:/somewhere/others.parquet", "16 calibration images of others.parquet"),
    ],
)
def test_calibration_images_have_their_source(source: str | None, words: str) -> None:
    assert calibrated(Settings(networks=(NetworkSettings(calibration=source),))) == words


def test_a_proxy_is_of_a_network_with_its_weights_and_images(tmp_path: Path) -> None:
    found = {"network": "cifar_resnet20", "weights": str(tmp_path / "a.pt"), "images": f"cifar10:{tmp_path}"}
    own = ProxySubject("run/p001", "", "", Given(tmp_path, {"networks": [found]}))
    assert named(own, NetworkSettings(**found)) == (
        "TAP (run/p001)",
        "found on this network, by a search that measured errors there",
    )
    for changed in ({"weights": str(tmp_path / "b.pt")}, {"images": f"imagefolder:{tmp_path}"}):
        other = NetworkSettings(**{**found, **changed})
        assert named(own, other) == ("TAP-C (run/p001)", "found on cifar_resnet20, applied unchanged")
    published = ProxySubject("channel_noise", "", "", None)
    assert named(published, NetworkSettings(**found))[1].startswith("found on a network of this name, by a search")


def test_costs_say_in_how_many_seeds_they_failed() -> None:
    cost = _Cost("proxy", (), ["found elsewhere"])
    cost.add({"scoring": 0.1})
    assert cost.told(1) == "found elsewhere"
    cost.failed.append("it fails.")
    cost.notes += ["found elsewhere", "a trace is below 0"]
    assert cost.told(2) == "found elsewhere; in 1 of 2: a trace is below 0; not measured in 1 of 2: it fails."
    assert _Cost("baseline", (), failed=["none."]).told(1) == "not measured: none."
    assert _Cost("baseline", ()).told(2) == "looks at nothing"
