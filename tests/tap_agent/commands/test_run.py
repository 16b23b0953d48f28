"""Real runs on the embedded defaults, and what is done with them after."""

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
import yaml

from agents.account import Account
from tap_agent.exit import Exit
from tap_agent.report import html
from tap_agent.report.figures import kib
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.result import Result
from tap_eval.device import chosen, found
from tests.agents.scripted import Answer, ChatServer, proposal, tool_call
from tests.graphs.test_search import script
from tests.tap_agent.program import GOOD, REPLAY, SMALL, hear, tap


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
    result = json.loads((finished / "result.json").read_text())
    channels = [layer["out_channels"] for layer in result["networks"][0]["layers"]]
    packed, mixed = 0, 0
    for layer, count in zip(network["layers"], channels, strict=True):
        bits = layer["weight_bits"] if isinstance(layer["weight_bits"], list) else [layer["weight_bits"]] * count
        packed += sum(-(-layer["params"] // count * each // 8) for each in bits)
        mixed += count if len(set(bits)) > 1 else 0
    assert [each["name"] for each in network["between"] if not each["input_of"]] == ["blocks.3.1.0.output"]
    assert network["size_parts"] == {
        "weights": packed, "scales": 4 * sum(channels), "biases": 4 * sum(channels), "inputs": 5 * (len(channels) + 1),
        "channel_bits": mixed, "rest": 0,
    }  # fmt: skip
    assert network["size_bytes"] == sum(network["size_parts"].values())
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


def test_the_report_does_not_claim_more_than_the_file(finished: Path) -> None:
    page, events = (finished / "report.html").read_text(), (finished / "events.jsonl").read_text().splitlines()
    result = Result.model_validate_json((finished / "result.json").read_text())
    (network,) = json.loads((finished / "best.json").read_text())["networks"]
    size, full = network["size_bytes"], 4 * (7624 + 314)  # weights, and a bias a channel
    said = re.search(r"the packed network, ([0-9.]+) % smaller than float32", page)
    assert said
    assert 0 <= 100 * (1 - size / full) - float(said[1]) < 0.1
    assert f"Of the {size / 1024:,.1f} KiB: weights" in page
    assert "scales 1.23, biases 1.23" in page
    assert "The budget is 3bit (weights alone)." in page
    assert "KiB of the whole packed network" in page
    assert "size of the packed network (KiB)" in page
    assert kib(result.candidate(result.best), 0, result.networks[0]) == size / 1024
    judged = {each["name"]: each for each in map(json.loads, events) if each["event"] == "judged"}
    assert judged[result.best]["size_bytes"][0] == size


def test_the_report_says_what_more_bits_would_buy(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    (own,) = (row["bits"] for row in result["table"] if row["kind"] == "proxy")
    points = sorted((row for row in result["curve"] if row["kind"] == "proxy"), key=lambda row: row["bits"])
    more = next(row for row in points if row["bits"] > own)
    sentence = re.search(r"The same proxy gives ([\d.]+) .*? KiB at (\w+)", (finished / "report.html").read_text())
    assert sentence
    assert sentence.groups() == (f"{100 * more['test']['top1']:.1f}", more["budget"])


def test_a_result_of_before_sizes_were_whole_is_shown_as_it_was(finished: Path) -> None:
    old = json.loads((finished / "result.json").read_text())
    for layer in old["networks"][0]["layers"]:
        del layer["out_channels"]
    for row in old["table"]:
        row["size_bytes"] = row.pop("parts").get("weights", row["size_bytes"])
    result = Result.model_validate(old)
    page = html.render(result)
    assert "of weights, 9" in page
    assert "packed network" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "size of the weights (KiB)" in page
    best = result.candidate(result.best)
    assert kib(best, 0, result.networks[0]) <= 3 * 7624 / 8 / 1024


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


def test_apply_takes_the_sizes_that_its_refusal_asks_for(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "good.py").write_text(GOOD)
    assert tap("apply", "good.py", "--draws", "1", "--search", "600", "--test", "700") == Exit.IMAGES
    advice = re.search(r"give --search (\d+) --test (\d+)", capsys.readouterr().err)
    assert advice
    search, test = advice.groups()
    assert tap("apply", "good.py", "--draws", "1", "--search", search, "--test", test) == Exit.OK
    assert f"n = {test}" in capsys.readouterr().out


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
    assert f"--device auto takes {', '.join(map(str, chosen('auto', found())))}" in printed.replace("\n", " ")


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


def test_an_interrupt_lets_no_further_call_begin_and_says_how_to_go_on(work: Path) -> None:
    def script(request: dict[str, Any]) -> Answer:
        return tool_call("run_code", code=GOOD)

    with ChatServer(script) as server:
        server.delay = 0.3
        running = subprocess.Popen(
            [sys.executable, "-m", "tap_agent", "run", *SMALL, "--llm", "x", "--base-url", server.url, "--out", "c"],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            preexec_fn=hear,
        )  # fmt: skip
        while len(server.asked) < 4:
            assert running.poll() is None
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        sent = len(server.asked)
        _, said = running.communicate(timeout=60)
        assert running.returncode == Exit.INTERRUPTED
        assert len(server.asked) <= sent + 3  # those of the agents that were just sending
        assert "continue with: tap-agent resume c" in said
        assert "Traceback" not in said
        spent = Account(work / "c" / "calls.sqlite").spent()
        assert spent.calls == len(server.asked)


def test_a_model_that_fails_in_the_middle_is_a_sentence(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ChatServer(lambda _: {"role": "assistant", "tool_calls": "nonsense"}) as server:
        assert tap("run", *SMALL, "--llm", "scripted", "--base-url", server.url, "--out", "x") == Exit.MODEL
    said = capsys.readouterr().err
    assert "continue with: tap-agent resume x" in said
    assert "the language model failed" in said


def test_a_search_in_which_nothing_lives_is_not_to_be_resumed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = proposal("No.", "def sensitivity(layers, task):\n    return [1 / 0 for x in layers]\n")
    small = ["--population", "2", "--generations", "0", "--search", "100", "--test", "100", "--draws", "1"]
    with ChatServer(lambda _: dict(bad)) as server:
        assert tap("run", *small, "--llm", "x", "--base-url", server.url, "--out", "dead") == Exit.PROXY
        said = capsys.readouterr().err
        assert "none of 2 proposals lived; dead/events.jsonl says why of each" in said
        assert "begin another by `tap-agent run` with another --llm" in said
        assert "resume" not in said
        assert tap("resume", "dead") == Exit.PROXY
        assert "resume" not in capsys.readouterr().err


def test_several_networks_come_from_a_config(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"network": "digits", "search": 100, "test": 100}
    config = {"networks": [network, {**network, "budget": "4bit"}], "population": 2, "generations": 0, "llm": REPLAY}
    (work / "two.yaml").write_text(yaml.safe_dump(config))
    assert tap("run", "--config", "two.yaml", "--out", "two") == Exit.OK
    result = RunFolder(work / "two").result()
    assert result is not None
    assert [network.budget for network in result.networks] == ["3bit", "4bit", "3.6bit", "4.8bit"]
    assert len(result.candidate(result.best).top1) == 4
    names = [network.name for network in result.networks]
    assert names == ["digits", "digits (2)", "digits at 3.6bit", "digits (2) at 4.8bit"]
    assert [row.network for row in result.table] == [names[0]] * 7 + [names[1]] * 7
