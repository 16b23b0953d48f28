"""`benchmark build`, `benchmark score` and a search that is judged by such a file, as a person runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tap_agent.sessions.benchmark import hold
from tap_agent.sessions.search import first_event
from tap_eval.benchmark.benchmark import read
from tap_eval.mistake import BenchmarkMistake
from tests.tap_agent.program import GOOD, REPLAY, SMALL, tap
from tools.sandbox import MontySandbox

BUILD = ("benchmark", "build", "--strata", "2", "--search", "200")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "digits.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAP_CACHE", str(cache))
        assert tap(*BUILD, "--out", str(path), "--count", "16") == Exit.OK
    return path


def test_proxies_and_baselines_are_held_against_what_was_measured(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = tmp_path / "mine.py"
    proxy.write_text(GOOD)
    assert tap("benchmark", "score", str(proxy), "paper", "layer_error", "bops", "--file", str(file)) == Exit.OK
    said = capsys.readouterr().out
    assert "16 allocations of digits in 2 ranges of size, 2 to 4 bits a weight, 200 images" in said
    rows = [line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│")]
    assert rows[0] == "layer_error"
    assert {"paper", "bops"} <= set(rows)
    assert tap("benchmark", "score", "--file", str(file)) == Exit.OK
    assert "hawq_v2" in capsys.readouterr().out


def test_what_cannot_be_held_is_named(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def sensitivity(layers, task):\n    return [1 / 0 for layer in layers]\n")
    for what, code, words in [
        ("nobody", Exit.PROXY, "'nobody' is no proxy ([Errno 2] No such file"),
        ("direct", Exit.PROXY, "foretells no allocation but its own"),
        ("uniform:3", Exit.PROXY, "'uniform:3' is no proxy"),
        (str(broken), Exit.PROXY, "fails on digits"),
    ]:
        assert tap("benchmark", "score", what, "--file", str(file)) == code
        assert words in capsys.readouterr().err
    assert tap("benchmark", "score", "paper", "--file", str(tmp_path / "none.parquet")) == Exit.BENCHMARK
    for flags in (["--least", "4", "--most", "3"], ["--count", "5000", "--search", "200"]):
        assert tap("benchmark", "build", "--out", str(tmp_path / "x.parquet"), *flags) == Exit.BENCHMARK
    for flag, value in (("--baselines", "uniform"), ("--sandbox", "e2b"), ("--channel-groups", "2")):
        assert tap("benchmark", "build", "--out", str(tmp_path / "x.parquet"), flag, value) == Exit.USAGE
    assert not (tmp_path / "x.parquet").exists()


def test_a_search_is_judged_by_it_and_measures_the_best_alone(file: Path, work: Path, sandbox: MontySandbox) -> None:
    given = work / "given.parquet"
    shutil.copy(file, given)
    flags = ["--llm", REPLAY, "--draws", "2", "--worth", "benchmark:given.parquet"]
    assert tap("run", *SMALL, *flags, "--out", "run") == Exit.OK
    folder = RunFolder(work / "run")
    result = folder.finished()
    living = [each for each in result.candidates if each.failure is None]
    assert len(living) > 3
    held = hold([str(work / "run" / "proxies" / f"{each.name}.py") for each in living], read(file), sandbox)
    values = {Path(each.name).stem: each.kl.spearman.value for each in held}
    for each in living:
        assert (each.top1, each.kl, each.images) == ([], [], [])
        assert each.foretelling == [pytest.approx(values[each.name])]
        assert each.fitness == pytest.approx(0.05 * each.rho[0] + 0.95 * each.foretelling[0])
    best = max(result.finalists, key=lambda each: each.fitness)
    assert best.fitness == max(each.value for each in living)
    assert all(each.kl > 0 and each.top1 > 0.1 for each in result.finalists)
    assert [network.name for network in result.networks] == ["digits"]
    (row,) = [row for row in result.table if row.kind == "proxy"]
    assert row.test.count == 200
    page = (work / "run" / "report.html").read_text()
    assert "foretelling" in page
    assert "measured on 0%" not in page

    settings = folder.settings()
    assert settings.worth == f"benchmark:{given}"
    started = folder.events()[0]
    assert first_event("resumed", started["thread"], settings, folder.events())["given"] == started["given"]
    assert tap(*BUILD, "--out", str(given), "--count", "18") == Exit.OK
    with pytest.raises(BenchmarkMistake, match="holds other allocations than when the run began"):
        first_event("resumed", started["thread"], settings, folder.events())


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--worth", "benchmark:FILE", "--racing", "0.1"], Exit.CONFIG, "no candidate is measured, so none can race"),
        (["--worth", "loss"], Exit.CONFIG, "'loss' is no worth: give kl, accuracy or benchmark:FILE"),
        (["--worth", "benchmark:none.parquet"], Exit.BENCHMARK, "none.parquet is not there"),
        (
            ["--worth", "benchmark:FILE", "--budget", "3bit,4bit"],
            Exit.BENCHMARK,
            "has digits, digits at 4bit: give one",
        ),
        (["--worth", "benchmark:FILE", "--inputs", "metadata"], Exit.BENCHMARK, "statistics in place of metadata"),
        (["--worth", "benchmark:FILE", "--rounding", "nearest"], Exit.BENCHMARK, "rounding gptq in place of nearest"),
    ],
)
def test_a_search_that_it_does_not_fit_is_refused_before_anything_is_written(
    flags: list[str], code: Exit, words: str, file: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag.replace("FILE", str(file)) for flag in flags]
    assert tap("run", *SMALL, "--llm", REPLAY, *given, "--out", "run") == code
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (work / "run").exists()
