"""Every benchmark runs, on a size that tells nothing."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tap_eval.quantization import integer
from tests.tap_agent.program import REPLAY, tap

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--count", "40", "--rounds", "1"]
COMMANDS = {
    "passes": (
        ["passes.py", "digits", "--images", "digits", *SMALL, "--allocations", "1", "--sweep", "20"],
        "integers",
    ),
    "devices": (
        ["devices.py", "squeezenet1_1", "--device", "cpu", "--size", "32", "--compared", "8", *SMALL],
        "| simulated, channels last |",
    ),
    "peers": (["peers.py", "digits", "--images", "digits", *SMALL, "--batches", "20"], "ONNX Runtime, W8A8 (QDQ)"),
    "sums": (
        ["sums.py", "digits", "--images", "digits", "--search", "40", "--bits", "2.5", "--draws", "1", "--exported"],
        "| 2.5 | int8 | ",
    ),
    "exported": (
        ["exported.py", "digits", "--images", "digits", *SMALL, "--bits", "2.5", "--stored", "packed,native"],
        "| exported, W2.5A8, native, sums in int8 |",
    ),
    "published": (
        ["published.py", "digits", "--images", "digits", "--search", "40", "--budgets", "2.5bit"],
        "| 2.5bit | `paper` |",
    ),
    "order": (
        ["order.py", "digits", "--images", "digits", "--search", "40", "--budgets", "2.5bit", "--count", "4"],
        "| 2.5bit | kl |",
    ),
    "reconstruction": (
        ["reconstruction.py", "digits", "--images", "digits", "--search", "40", "--draws", "1", "--steps", "10"],
        "\n| 3 | 0.",
    ),
    "growth": (["growth.py", "--scale", "0.01"], "| 32 candidates |"),
    "allocator": (["allocator.py", "--rounds", "2"], "| 50 layers of 4 groups | 2, 3, 4, 8, activations 4, 8 | BOPs |"),
    "soak": (["soak.py", "--candidates", "16"], "| 16 | "),
    "workers": (["workers.py", "--network", "digits", "--images", "digits", *SMALL, "--jobs", "3"], "two workers"),
    "seeds": (
        ["seeds.py", "tiny.yaml", "--seeds", "1", "--out", "seeds.jsonl"],
        "| 0 |",
    ),
}


@pytest.fixture
def run(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[[list[str]], str]]:
    """Runs a benchmark as its own command does, but in this process, which has imported all of it; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAP_CACHE", str(cache))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    threads = torch.get_num_threads()

    def ran(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(ROOT / "benchmarks" / arguments[0]), run_name="__main__")
        return capfd.readouterr().out

    yield ran
    torch.set_num_threads(threads)


@pytest.mark.skipif(not integer.exact(), reason="the benchmarks need integers, which this build cannot multiply")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_runs(name: str, tmp_path: Path, run: Callable[[list[str]], str]) -> None:
    arguments, expected = COMMANDS[name]
    (tmp_path / "tiny.yaml").write_text(
        f"networks: [{{network: digits, search: 60, test: 60}}]\npopulation: 2\ngenerations: 0\nllm: {REPLAY}\n"
    )
    assert expected in run(arguments)


def test_a_run_that_measured_everything_is_raced_again(tmp_path: Path, run: Callable[[list[str]], str]) -> None:
    (tmp_path / "tiny.yaml").write_text(
        "networks: [{network: digits, search: 60, test: 60}]\npopulation: 2\ngenerations: 0\n"
        f"second_budget: false\ncalibration_draws: 1\nfinish: false\nllm: {REPLAY}\n"
    )
    subprocess.run([sys.executable, "-m", "tap_agent", "run", "--config", "tiny.yaml", "--out", "ended"], check=True)
    assert "| 0.02 | 1 of 1 | 1.000 |" in run(["race.py", "ended"])


def test_what_is_foreseen_is_held_against_what_was_measured(run: Callable[[list[str]], str]) -> None:
    settings = [
        "--population",
        "20",
        "--generations",
        "0",
        "--search",
        "60",
        "--test",
        "60",
        "--draws",
        "1",
        "--no-finish",
    ]
    command = [sys.executable, "-m", "tap_agent", "run", *settings, "--baselines", "uniform", "--budget", "2.5bit"]
    subprocess.run([*command, "--out", "once"], check=True)
    table = run(["foreseen.py", "once"])
    assert re.search(r"\| 0 \| layer errors \| 0\.[4-9]", table), table
    assert "| 8 | both |" in table


def test_a_run_that_is_killed_twice_comes_to_what_it_would_have_come_to(run: Callable[[list[str]], str]) -> None:
    settings = ["--population", "2", "--generations", "1", "--search", "60", "--test", "60", "--draws", "1"]
    command = ["kills.py", "--times", "1", "--", *settings, "--baselines", "uniform", "--llm", REPLAY]
    with pytest.raises(SystemExit) as ended:
        run(command)
    assert ended.value.code == 0


def test_what_is_measured_of_reliability_is_written_into_its_page(
    tmp_path: Path, run: Callable[[list[str]], str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("".join(f"# {part}\n<!-- measured: {part} -->\nold\n<!-- end -->\n" for part in ("soak", "kills")))
    with pytest.raises(SystemExit) as ended:
        run(["reliability.py", "soak", "--candidates", "16", "--page", str(page)])
    assert ended.value.code == 0
    said = page.read_text()
    assert re.match(r"# soak\n<!-- measured: soak -->\n\nOn .*, at commit [0-9a-f]{7,}.*:\n", said)
    assert "benchmarks/soak.py --candidates 16\n```\n\n| candidates |" in said
    assert said.count("\n| 16 | ") == 1
    assert said.count("old") == 1
    assert said.endswith("# kills\n<!-- measured: kills -->\nold\n<!-- end -->\n")


def test_controllers_are_compared_by_measured_allocations(tmp_path: Path, run: Callable[[list[str]], str]) -> None:
    config, given = tmp_path / "tiny.yaml", tmp_path / "given.parquet"
    config.write_text("networks: [{network: digits, search: 60, test: 60}]\npopulation: 3\ngenerations: 2\n")
    assert (
        tap("benchmark", "build", "--config", str(config), "--count", "16", "--strata", "2", "--out", str(given)) == 0
    )
    command = ["controllers.py", "tiny.yaml", "--given", str(given), "--seeds", "2", "--controllers", "ratio,uniform"]
    said = run(command)
    assert "2 seeds; uniform comes to " in said
    searches = [json.loads(line) for line in Path("controllers.jsonl").read_text().splitlines()]
    assert [len(each["proposals"]) for each in searches] == [9] * 4
    first, other = ([p["fitness"] for p in each["proposals"][:3]] for each in searches[:2])
    assert first == other
    assert run([*command[:-3], "1", *command[-2:]]).splitlines()[-1].startswith("| uniform | ")
    assert len(Path("controllers.jsonl").read_text().splitlines()) == 4
