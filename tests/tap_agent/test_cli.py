"""The program as a person runs it: real runs on the embedded defaults, and one sentence for each mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agents.account import Account
from tap_agent.__main__ import main
from tap_agent.exit import Exit
from tap_agent.folder import RunFolder
from tap_agent.settings import Settings
from tests.agents.scripted import Answer, ChatServer, tool_call
from tests.graphs.test_search import script

GOOD = "def sensitivity(layers, task):\n    return [1 / layer['params'] for layer in layers]\n"
SMALL = ["--population", "3", "--generations", "1", "--search", "200", "--test", "200", "--draws", "2"]


@pytest.fixture
def work(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with the trained network at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAP_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path


def tap(*arguments: str) -> int:
    """Runs the program in this process; its exit status."""
    before, sys.argv = sys.argv, ["tap-agent", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run on the embedded model, through the installed program."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "tap_agent", "run", *SMALL, "--out", str(folder)],
        env={**os.environ, "TAP_CACHE": str(cache), "COLUMNS": "160"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "measured layer error" in done.stdout
    assert "generation index=1" in done.stdout
    assert str(folder / "report.html") in done.stdout
    assert "Traceback" not in done.stderr
    return folder


def test_a_run_leaves_a_folder_that_tells_everything(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml", "checkpoints.sqlite", "events.jsonl", "proxies", "best.json", "result.json", "report.html",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(".new")]
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config["population"], config["budget"], config["networks"][0]["search"]) == (3, "3bit", 200)
    best = json.loads((finished / "best.json").read_text())
    (network,) = best["networks"]
    bits = sum(
        layer["params"] * layer["weight_bits"]
        if isinstance(layer["weight_bits"], int)
        else layer["params"] // len(layer["weight_bits"]) * sum(layer["weight_bits"])
        for layer in network["layers"]
    )
    assert network["size_bytes"] == -(-bits // 8)
    assert network["weight_bits"] <= 3
    assert network["test"]["count"] == 200
    assert len(network["test_top1_by_calibration_draw"]) == 2
    assert best["provenance"]["llm"] == "embedded"
    proxy = (finished / "proxies" / f"{best['provenance']['proxy']}.py").read_text()
    assert proxy.startswith('"""')
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] in ("started", "finished")] == ["started", "finished"]
    assert len([event for event in events if event["event"] == "proposed"]) == 6


def test_the_report_is_one_file_with_every_figure(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    for title in (
        "Beside the baselines", "The proxy", "Fitness by generation", "Template probabilities", "Proposals that died",
        "Accuracy against size", "Bits a layer", "Family tree",
    ):  # fmt: skip
        assert title in page
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=["']?http""", outside)


def test_a_second_run_of_the_same_config_measures_nothing_again(
    finished: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tap("run", "--config", str(finished / "config.yaml"), "--out", "again") == Exit.OK
    assert "; 0 measurements;" in capsys.readouterr().out
    first, second = (json.loads((folder / "best.json").read_text()) for folder in (finished, work / "again"))
    assert first["networks"] == second["networks"]


def test_a_proxy_is_applied_to_its_own_run_and_to_others(
    finished: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tap("apply", str(finished), "--budget", "4bit", "--out", "new/bits.json") == Exit.OK
    printed = capsys.readouterr().out
    assert re.search(r"scoring 0\.\d{4} s, allocation 0\.\d{4} s", printed)
    assert "0.0133 s and 0.0645 s" in printed
    assert 3 < json.loads((work / "new" / "bits.json").read_text())["networks"][0]["weight_bits"] <= 4
    best = json.loads((finished / "best.json").read_text())["provenance"]["proxy"]
    proxy = finished / "proxies" / f"{best}.py"
    assert tap("apply", str(proxy), "--network", "digits", "--test", "100", "--bits", "2,3,4,8") == Exit.OK
    assert "n = 100" in capsys.readouterr().out


def test_reports_and_lists(finished: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "report.html").unlink()
    assert tap("report", str(finished)) == Exit.OK
    assert (finished / "report.html").exists()
    assert tap("list", str(finished.parent)) == Exit.OK
    assert "finished" in capsys.readouterr().out
    assert tap("list") == Exit.OK
    assert "no runs in runs" in capsys.readouterr().out


def test_the_doctor_finds_a_default_run_possible(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tap("doctor") == Exit.OK
    printed = capsys.readouterr().out
    for part in ("device", "sandbox", "language model", "images", "network", "cache"):
        assert f"ok   {part}" in printed


def test_a_killed_run_is_resumed_and_no_other_process_may_write_to_it(
    work: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def slowly(request: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.3)
        return script(request)

    with ChatServer(slowly) as server:
        arguments = [
            "run",
            *SMALL,
            "--llm",
            "scripted",
            "--base-url",
            server.url,
            "--seed",
            "77",
        ]  # which no other test measures
        running = subprocess.Popen([sys.executable, "-m", "tap_agent", *arguments, "--out", "killed"])
        events = work / "killed" / "events.jsonl"
        while not events.exists() or events.read_text().count('"judged"') < 3:
            assert running.poll() is None
            time.sleep(0.05)
        assert tap("resume", "killed") == Exit.RUN
        assert "being written by another process" in capsys.readouterr().err
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert tap("list", ".") == Exit.OK
        assert "interrupted" in capsys.readouterr().out
        assert tap("report", "killed") == Exit.RUN
        assert tap("resume", "killed") == Exit.OK
        assert tap(*arguments, "--out", "whole") == Exit.OK
    killed, whole = (RunFolder(work / name).result() for name in ("killed", "whole"))
    assert killed is not None
    assert whole is not None
    assert killed.measured > RunFolder(work / "killed").events()[-1]["measured"]  # which is the last session's
    same = {"generations", "best", "table"}
    assert killed.model_dump(include=same) == whole.model_dump(include=same)
    assert tap("resume", "killed") == Exit.OK


def test_an_interrupt_stops_cleanly_and_says_how_to_go_on(work: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "tap_agent", "run", *SMALL, "--generations", "9", "--out", "stopped"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    )  # fmt: skip
    while not (work / "stopped" / "events.jsonl").exists():
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=240)  # the proposals in hand are finished first
    assert running.returncode == Exit.INTERRUPTED
    assert "continue with: tap-agent resume stopped" in said
    assert "Traceback" not in said


def test_the_time_of_a_run_is_that_of_its_sessions(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", Settings())
    days = {"started": "01T10:00:00", "finished": "01T10:00:10", "refined": "04T10:00:00", "resumed": "05T10:00:00",
            "stopped": "05T10:00:05", "forked": "09T10:00:00"}  # fmt: skip
    lines = [json.dumps({"event": event, "at": f"2026-01-{day}+00:00"}) for event, day in days.items()]
    (folder.path / "events.jsonl").write_text("\n".join(lines))
    assert folder.seconds() == 15


def test_an_interrupt_lets_no_further_call_begin(work: Path) -> None:
    def script(request: dict[str, Any]) -> Answer:
        return tool_call("run_code", code=GOOD)

    with ChatServer(script) as server:
        server.delay = 0.3
        running = subprocess.Popen(
            [sys.executable, "-m", "tap_agent", "run", *SMALL, "--llm", "x", "--base-url", server.url, "--out", "c"],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        while len(server.asked) < 4:
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        sent = len(server.asked)
        _, said = running.communicate(timeout=60)
        assert running.returncode == Exit.INTERRUPTED
        assert len(server.asked) <= sent + 3  # those of the agents that were just sending
        assert "Traceback" not in said
        spent = Account(work / "c" / "calls.sqlite").spent()
        assert spent.calls == len(server.asked)


def test_a_model_that_fails_in_the_middle_is_a_sentence(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChatServer(lambda _: {"role": "assistant", "tool_calls": "nonsense"}) as server:
        assert tap("run", *SMALL, "--llm", "scripted", "--base-url", server.url, "--out", "x") == Exit.MODEL
    said = capsys.readouterr().err
    assert "continue with: tap-agent resume x" in said
    assert "the language model failed" in said


MISTAKES: list[tuple[list[str], Exit, str]] = [
    (["--network", "resnet81"], Exit.NETWORK, "'resnet81' is an unknown network"),
    (["--network", "cifar_resnet20"], Exit.WEIGHTS, "--weights FILE"),
    (["--network", "cifar_resnet20", "--weights", "absent.pt"], Exit.WEIGHTS, "absent.pt does not exist"),
    (["--network", "cifar_resnet20", "--weights", "garbage.pt"], Exit.WEIGHTS, "cannot be read as a state dict"),
    (["--network", "cifar_resnet20", "--weights", "other.pt"], Exit.WEIGHTS, "does not fit cifar_resnet20"),
    (["--images", "nothing"], Exit.IMAGES, "'nothing' is no image source"),
    (["--images", "imagefolder:empty"], Exit.IMAGES, "no images in class folders"),
    (["--network", "tests.tap_eval.test_networks:tiny"], Exit.NETWORK, "does not run on images of shape"),
    (["--search", "5000"], Exit.IMAGES, "1,797 images"),
    (["--budget", "1.5bit"], Exit.BUDGET, "below what the smallest bits need, 2bit"),
    (["--budget", "99%"], Exit.BUDGET, "below what the smallest bits need, 93.75%"),
    (["--budget", "lots"], Exit.BUDGET, "'lots' is no budget"),
    (["--bits", "1,4"], Exit.BITS, "[1, 4] for weights"),
    (["--bits", "two"], Exit.CONFIG, "'two' are no bits"),
    (["--llm", "gpt-x"], Exit.MODEL, "set OPENAI_API_KEY"),
    (["--llm", "x", "--base-url", "http://127.0.0.1:9/v1"], Exit.MODEL, "http://127.0.0.1:9/v1 does not answer"),
    (["--llm", "x", "--base-url", "nonsense"], Exit.MODEL, "nonsense does not answer"),
    (["--executor", "ray", "--address", "127.0.0.1:9"], Exit.EXECUTOR, "127.0.0.1:9 does not answer"),
    (["--sandbox", "e2b"], Exit.SANDBOX, "E2B_API_KEY is not set"),
    (["--sandbox", "none"], Exit.CONFIG, "sandbox = 'none'"),
    (["--config", "absent.yaml"], Exit.CONFIG, "absent.yaml cannot be read"),
    (["--config", "typo.yaml"], Exit.CONFIG, "'genrations' in typo.yaml is an unknown setting: perhaps generations"),
    (["--config", "list.yaml"], Exit.CONFIG, "holds a list"),
    (["--config", "broken.yaml"], Exit.CONFIG, "is not YAML"),
    (["--config", "two.yaml", "--network", "digits"], Exit.CONFIG, "does not say which network"),
    (["--alpha", "2"], Exit.CONFIG, "alpha = 2.0"),
    (["--base-url", "http://me:secret@host/v1"], Exit.CONFIG, "base_url: it is written to"),
    (["--base-url", "http://host/v1?key=secret"], Exit.CONFIG, "give the key in OPENAI_API_KEY"),
    (["--out", "garbage.pt/run"], Exit.RUN, "garbage.pt/run cannot be written"),
    (["--transform", "rezise=3"], Exit.CONFIG, "perhaps resize"),
    (["--controller", "none"], Exit.USAGE, "ratio"),
    (["--generation", "3"], Exit.USAGE, "--generations"),
]


@pytest.mark.parametrize(("arguments", "code", "sentence"), MISTAKES, ids=[" ".join(case[0]) for case in MISTAKES])
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    work: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: Exit, sentence: str
) -> None:
    (work / "empty").mkdir()
    (work / "garbage.pt").write_bytes(b"garbage")
    torch.save({"weight": torch.ones(2)}, work / "other.pt")
    (work / "typo.yaml").write_text("genrations: 3\n")
    (work / "list.yaml").write_text("- 1\n")
    (work / "broken.yaml").write_text("a: [1\n")
    (work / "two.yaml").write_text("networks: [{network: digits}, {network: digits}]\n")
    before = {path.name for path in work.iterdir()}
    assert tap("run", *arguments) == code
    said = capsys.readouterr().err
    assert sentence in " ".join(said.split())
    assert "Traceback" not in said
    if code != Exit.USAGE:
        assert len(said.strip().splitlines()) == 1
    assert {path.name for path in work.iterdir()} == before


def test_folders_that_are_no_runs_and_proxies_that_are_none(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "bad.py").write_text("import os\n")
    cases = {
        ("resume", "nowhere"): (Exit.RUN, "nowhere is no run folder"),
        ("report", "."): (Exit.RUN, "is no run folder"),
        ("apply", "nowhere"): (Exit.PROXY, "nowhere is no proxy and no run"),
        ("apply", "bad.py"): (Exit.PROXY, "bad.py fails (forbidden)"),
        ("run", "--out", "."): (Exit.RUN, "exists already"),
    }
    for arguments, (code, sentence) in cases.items():
        assert tap(*arguments) == code
        assert sentence in capsys.readouterr().err


def test_several_networks_come_from_a_config(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"network": "digits", "search": 100, "test": 100}
    config = {"networks": [network, {**network, "budget": "4bit"}], "population": 2, "generations": 0}
    (work / "two.yaml").write_text(yaml.safe_dump(config))
    assert tap("run", "--config", "two.yaml", "--out", "two") == Exit.OK
    result = RunFolder(work / "two").result()
    assert result is not None
    assert [network.budget for network in result.networks] == ["3bit", "4bit"]
    assert len(result.candidate(result.best).top1) == 2
    names = [network.name for network in result.networks]
    assert names == ["digits", "digits (2)"]
    assert [row.network for row in result.table] == [names[0]] * 7 + [names[1]] * 7


def test_help_explains_every_option(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tap("run", "--help") == Exit.OK
    printed = capsys.readouterr().out
    for option in ("--network", "--images", "--budget", "--generations", "--controller", "--alpha", "--llm", "--seed"):
        assert option in printed


def test_an_intruder_among_the_packages_is_named(work: Path) -> None:
    (work / "agents").mkdir()
    (work / "agents" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "tap_agent", "--help"], env={**os.environ, "PYTHONPATH": str(work)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == Exit.FAILED
    assert "the package 'agents' comes from" in done.stderr
