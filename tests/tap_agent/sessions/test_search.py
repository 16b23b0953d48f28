"""What a run began with is what it ends with."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder, RunMistake
from tap_agent.sessions.resources import Resources
from tap_agent.sessions.search import SearchSession, check_same, content_of, search
from tap_eval.images.images import Splits
from tap_eval.kept import Kept
from tap_eval.measuring.bench import Bench
from tap_eval.networks.digits import load_digits_cnn
from tests.tap_agent.program import REPLAY, tap


def test_a_run_of_which_only_the_report_is_left_is_not_concluded_with_other_weights(
    run: RunFolder, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_digits_cnn(cache).state_dict()
    weights["classifier.bias"] += 1
    Kept(tmp_path / "other" / "networks").keep("digits-cnn-v1", weights)
    run.outcome.unlink()
    monkeypatch.setenv("TAP_CACHE", str(tmp_path / "other"))
    assert tap("resume", str(run.path)) == Exit.RUN
    assert "digits has other weights than when the run began" in " ".join(capsys.readouterr().err.split())
    assert not run.outcome.exists()


def test_a_run_that_another_process_ended_meanwhile_is_not_ended_again(run: RunFolder, cache: Path) -> None:
    before = run.events()
    with Resources(run.settings(), cache) as resources:
        found = search(run, resources, lambda event: None)
    assert found == run.result()
    assert run.events() == before


def test_all_images_are_held_against_those_that_the_run_began_with(bench: Bench) -> None:
    began = content_of(bench)
    before = [{"network": "digits", "content": began}]
    check_same(before, [bench])
    splits = bench.splits
    first, second = splits.calibrations
    others = {
        "test images": replace(splits, test=splits.search),
        "calibration images": replace(splits, calibrations=[second, second]),
        "further calibration images": replace(splits, calibrations=[first, first]),
    }
    for what, other in others.items():
        changed = content_of(cast("Bench", Measured(bench, other)))
        assert {name for name in began if began[name] != changed[name]} == {what}
        with pytest.raises(RunMistake, match=f"^digits has other {what} than when the run began"):
            check_same([{"network": "digits", "content": changed}, *before], [bench])
    with pytest.raises(RunMistake, match=r"^digits has other latencies than when the run began"):
        check_same([{"network": "digits", "content": {**began, "latencies": "0123"}}], [bench])
    older = {"weights": began["weights"], "search images": began["search images"]}
    check_same([{"network": "digits", "content": older}], [bench])


def test_what_was_there_before_a_search_can_be_collected_after_it_and_so_can_searches_before_the_last(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Circle:
        def __init__(self) -> None:
            self.itself = self

    monkeypatch.setenv("TAP_CACHE", str(cache))
    circle = Circle()
    left = weakref.ref(circle)
    settings = ["--population", "2", "--generations", "0", "--search", "60", "--test", "60", "--draws", "1"]
    alive = []
    for name in ("first", "second", "third"):
        assert (
            tap("run", *settings, "--baselines", "uniform", "--llm", REPLAY, "--out", str(tmp_path / name)) == Exit.OK
        )
        gc.collect()
        alive.append(sum(type(each) is SearchSession for each in gc.get_objects()))
    assert alive[2] <= alive[0]
    del circle
    gc.collect()
    assert left() is None


class Measured:
    """A bench with other images."""

    def __init__(self, bench: Bench, splits: Splits) -> None:
        self.weights_digest, self.splits, self.task = bench.weights_digest, splits, bench.task
