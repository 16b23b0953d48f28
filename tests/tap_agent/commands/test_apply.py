"""`apply`: proxies, runs, allocation files and uniform bits, at one budget and at several."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.result import Result, Row
from tests.tap_agent.program import GOOD, tap
from tests.tap_agent.terminal.test_display import in_terminal

DIGITS = ["--search", "100", "--test", "100"]


@pytest.fixture
def result(ended: Path) -> Result:
    found = RunFolder(ended).result()
    assert found
    return found


@pytest.fixture
def changed(ended: Path, work: Path) -> Callable[..., str]:
    """Writes the run's allocation file with something changed, and gives its name."""

    def written(change: Callable[[list[dict[str, Any]]], object]) -> str:
        best = json.loads((ended / "best.json").read_text())
        change(best["networks"][0]["layers"])
        (work / "bits.json").write_text(json.dumps(best))
        return "bits.json"

    return written


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.kind == kind]


def test_an_allocation_file_is_what_the_run_measured_and_can_be_passed_on(
    ended: Path, result: Result, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tap("apply", str(ended / "best.json"), "--out", "bits.json") == Exit.OK
    (proxy,) = of_kind(result.table, "proxy")
    printed = capsys.readouterr().out
    top1 = f"{100 * proxy.test.top1:.1f} ({100 * proxy.test.low:.1f} to {100 * proxy.test.high:.1f})"
    assert re.search(rf"best\.json +│ +{proxy.bits:.2f} .*{re.escape(top1)}", printed)
    assert "calibration draws" not in printed
    sizes = [float(found) for found in re.findall(r"│ +(\d+\.\d\d) +│", printed)]
    assert max(size for size in sizes if size < 32) <= proxy.bits + 0.005  # the baselines are no larger
    first, second = (json.loads(path.read_text()) for path in (ended / "best.json", work / "bits.json"))
    for layer in second["networks"][0]["layers"]:
        del layer["weight_scales"]  # the file beside best.json has them
    assert first["networks"][0]["layers"] == second["networks"][0]["layers"]
    assert second["code"] == ""
    assert tap("apply", "bits.json", *DIGITS, "--draws", "2", "--out", "again.json") == Exit.OK
    assert "test, 2 calibration draws" in capsys.readouterr().out
    again = json.loads((work / "again.json").read_text())["networks"][0]
    for one, other in zip(again["layers"], first["networks"][0]["layers"], strict=True):
        assert (one["name"], one["weight_bits"]) == (other["name"], other["weight_bits"])
    assert len(again["test_top1_by_calibration_draw"]) == 2


def test_uniform_bits_are_compared_at_their_own_size(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tap("apply", "uniform:3", *DIGITS) == Exit.OK
    printed = capsys.readouterr().out
    assert len(re.findall(r"uniform W\dA8 +│", printed)) == 1
    assert re.search(r"uniform W3A8 +│ +3\.00", printed)
    assert "these bits are not among the choices" in printed
    assert "the baselines have the size that uniform:3 takes: 3bit" in printed
    assert tap("apply", "uniform:3", *DIGITS, "--bits", "4,8") == Exit.OK
    said = capsys.readouterr()
    assert "uniform W3A8" in said.out
    assert "random scores" not in said.out
    assert "left out: the baselines beside uniform:3: digits: a budget of 3bit is below" in said.err
    assert tap("apply", "uniform", *DIGITS, "--budget", "2.9bit,4bit") == Exit.OK
    printed = capsys.readouterr().out
    assert re.findall(r"uniform W(\d)A8 +│", printed) == ["2", "4"]


def test_baselines_are_those_that_are_asked_for_and_say_what_they_see(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "good.py").write_text(GOOD)
    asked = ["--baselines", "auto_quantize, ompq,weight_error", "--plot", "rows.html"]
    assert tap("apply", "good.py", *DIGITS, *asked) == Exit.OK
    printed = capsys.readouterr().out
    labels = re.findall(r"^│ (\S+(?: \S+)?) +│ +\d", printed, re.MULTILINE)
    assert labels == ["full precision", "good.py", "weight error", "OMPQ", "AutoQuantize"]
    page = (work / "rows.html").read_text()
    for text in (printed, page):
        assert "sees statistics of layers" in text
        assert "sees images: 16 images, 1 step, " in text
        assert re.search(r"sees weights, images, labels, gradients: 16\s", text)


def test_a_baseline_that_a_network_cannot_have_is_left_out(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--network", "tests.tap_eval.baselines.small:Stopped", "--baselines", "snip,uniform", "--budget", "3bit"]
    assert tap("apply", "paper", *DIGITS, *network) == Exit.OK
    said = capsys.readouterr()
    assert "uniform W3A8" in said.out
    assert "bit-SNIP" not in said.out
    assert re.search(r"left out: bit-SNIP: \S+ has no gradients in first, since its code stops them", said.err)


def test_several_budgets_give_a_curve_and_one_that_cannot_be_met_is_left_out(
    ended: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tap("apply", str(ended), "--budget", "1.5bit,2.5bit, 4bit", "--plot", "new/curve.html") == Exit.OK
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "left out: digits: a budget of 1.5bit is below what the smallest bits need, 2bit: raise the budget."
    ]
    rows = re.findall(r"│ +(2\.5bit|4bit) │ ([\w/ ]+?) +│ +(\d\.\d\d) │", said.out)
    assert [budget for budget, _, _ in rows] == ["2.5bit"] * 6 + ["4bit"] * 6
    assert all(float(bits) <= float(budget.removesuffix("bit")) for budget, _, bits in rows)
    assert said.out.count("full precision") == 1
    page = (work / "new" / "curve.html").read_text()
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=["']?http""", outside)
    for text in ("Accuracy against size: digits", "measured layer error", "2.5bit", "size of the packed network (KiB)"):
        assert text in page
    assert tap("apply", str(ended), "--budget", "1bit,1.5bit") == Exit.BUDGET
    assert "a budget of 1bit is below" in capsys.readouterr().err


def test_a_budget_in_time_holds_and_rows_tell_theirs(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tap("apply", "uniform:8", *DIGITS, "--out", "all.json") == Exit.OK
    layers = [layer["name"] for layer in json.loads((work / "all.json").read_text())["networks"][0]["layers"]]
    rows = [f"{name},{bits},8,{0.01 * bits}" for name in layers for bits in (2, 4, 8)]
    (work / "device.csv").write_text("\n".join(["layer,weight_bits,activation_bits,ms", *rows]))
    timed = ["--latencies", "device.csv", "--baselines", "uniform,hawq_v3,ompq", *DIGITS]
    capsys.readouterr()
    assert tap("apply", "paper", "--budget", "0.5ms", *timed, "--out", "bits.json") == Exit.OK
    said = capsys.readouterr()
    assert "left out: OMPQ: its programme is linear in bits" in " ".join((said.out + said.err).split())
    (network,) = json.loads((work / "bits.json").read_text())["networks"]
    bits = [sum(layer["weight_bits"]) / len(layer["weight_bits"]) if isinstance(layer["weight_bits"], list)
            else layer["weight_bits"] for layer in network["layers"]]  # fmt: skip
    assert network["latency_ms"] == pytest.approx(0.01 * sum(bits))
    assert network["latency_ms"] <= 0.5
    assert re.search(r"uniform W4A8 .*│ +0\.4 +│", said.out)
    assert tap("apply", "paper", "--budget", "0.1ms", *timed) == Exit.BUDGET
    assert "below what the fastest bits need, 200us" in capsys.readouterr().err
    assert tap("apply", "paper", "--budget", "1ms", *DIGITS) == Exit.BUDGET
    assert "needs the latencies of layers: give --latencies FILE" in capsys.readouterr().err


def test_a_budget_holds_for_every_network(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"network": "digits", "search": 100, "test": 100}
    (work / "two.yaml").write_text(yaml.safe_dump({"networks": [network, {**network, "budget": "4bit"}]}))
    (work / "good.py").write_text(GOOD)
    assert tap("apply", "good.py", "--config", "two.yaml", "--out", "two.json") == Exit.OK
    first, second = json.loads((work / "two.json").read_text())["networks"]
    assert first["weight_bits"] <= 3 < second["weight_bits"] <= 4
    capsys.readouterr()
    assert tap("apply", "two.json", "--config", "two.yaml", "--budget", "4bit") == Exit.OK
    assert len(re.findall(r"two\.json +│", capsys.readouterr().out)) == 2
    assert tap("apply", "good.py", "--config", "two.yaml", "--budget", "2.5bit", "--out", "two.json") == Exit.OK
    networks = json.loads((work / "two.json").read_text())["networks"]
    assert all(network["weight_bits"] <= 2.5 for network in networks)


def renamed(layers: list[dict[str, Any]]) -> None:
    layers[2]["name"] = "elsewhere"


FILES: list[tuple[Callable[[list[dict[str, Any]]], object], list[str], Exit, str]] = [
    (renamed, [], Exit.PROXY, "bits.json is not for digits but for digits: it has no layer "),
    (lambda layers: layers[1].update(params=5), [], Exit.PROXY, "it has 5 weights in layer "),
    (lambda layers: layers[1].update(weight_bits=[4]), [], Exit.PROXY, "it has 1 output channels in layer "),
    (lambda layers: layers.append({**layers[0], "name": "more"}), [], Exit.PROXY, "it has a layer more; name the"),
    (lambda layers: layers[0].update(weight_bits=9), [], Exit.BITS, "9 bits: whole numbers from 2 to 8"),
    (lambda layers: layers[0].update(activation_bits=1), [], Exit.BITS, "1 bits: whole numbers from 2 to 8"),
    (lambda layers: layers[0].update(weight_bits=3), ["--bits", "2,4,8"], Exit.BITS,
     "3 bits, which are not among --bits 2,4,8: offer them too"),
    (lambda layers: layers[0].update(activation_bits=4), ["--activation-bits", "8"], Exit.BITS,
     "which are not among --activation-bits 8"),
    (lambda layers: layers[0].pop("params"), [], Exit.PROXY, "is no allocation file (networks.0.layers.0.params: "),
    (lambda layers: None, ["--budget", "2bit"], Exit.BUDGET, "raise it, or leave out --budget to compare at the size"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "flags", "code", "sentence"), FILES, ids=[case[-1] for case in FILES])
def test_an_allocation_file_that_does_not_fit_is_one_sentence(
    changed: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[list[dict[str, Any]]], object],
    flags: list[str],
    code: Exit,
    sentence: str,
) -> None:
    assert tap("apply", changed(change), *DIGITS, *flags) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.strip().splitlines()) == 1


def test_the_baselines_may_take_the_bits_of_the_file(
    changed: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    def three(layers: list[dict[str, Any]]) -> None:
        for layer in layers:
            layer.update(weight_bits=3, activation_bits=6)

    file = Path(changed(three))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"settings": None}))  # a file of before, or by hand
    assert tap("apply", "bits.json", *DIGITS) == Exit.OK
    printed = capsys.readouterr().out
    assert re.search(r"uniform W3A6 +│", printed)
    assert "these bits are not among the choices" not in printed


def test_what_is_nothing_to_apply_is_one_sentence(ended: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "empty.json").write_text("")
    (work / "file").write_text("")
    run = str(ended)
    for arguments, code, sentence in [
        (["uniform:1"], Exit.BITS, "'uniform:1' gives no bits that weights may have: write one whole number from 2"),
        (["uniform:9"], Exit.BITS, "from 2 to 8, as in uniform:3"),
        (["uniform:2,3"], Exit.BITS, "write one whole number"),
        (["uniform:"], Exit.BITS, "write one whole number"),
        (["uniform:3", "--budget", "2bit"], Exit.BUDGET, "uniform:3 does not fit: the allocation is"),
        (["empty.json"], Exit.PROXY, "empty.json is no allocation file"),
        (["nowhere"], Exit.PROXY, "nowhere is no proxy and no run: give a proxy's .py file, a published"),
        ([run, "--budget", "2bit,lots"], Exit.BUDGET, "'lots' is no budget"),
        ([run, "--budget", "2bit,"], Exit.BUDGET, "'' is no budget"),
        ([run, "--budget", "3bit,4bit", "--out", "x.json"], Exit.BUDGET, "--out keeps the allocation of one budget"),
        ([run, "--plot", "file/x.html"], Exit.RUN, "file/x.html cannot be written"),
        ([run, "--draws", "0"], Exit.USAGE, "--draws"),
    ]:
        assert tap("apply", *arguments) == code, arguments
        assert sentence in " ".join(capsys.readouterr().err.split()), arguments


def test_a_run_measures_a_curve_for_its_report(ended: Path, result: Result) -> None:
    (proxy,) = of_kind(result.table, "proxy")
    assert [row.budget for row in result.curve] == ["2bit"] * 3 + ["4bit"] * 3 + ["5bit"] * 3
    labels = [row.label for row in result.curve]
    assert labels == [x for bits in (2, 4, 5) for x in (proxy.label, f"uniform W{bits}A8", "measured layer error")]
    assert all(row.bits <= float(row.budget.removesuffix("bit")) for row in result.curve)
    assert {row.test.count for row in result.curve} == {200}
    page = (ended / "report.html").read_text()
    assert "bits allocated anew at each budget" in page
    assert page.count('"name":"uniform bits"') == 1


def test_a_result_of_before_there_was_a_curve_is_shown(ended: Path, work: Path) -> None:
    shutil.copytree(ended, "old")
    before = json.loads(Path("old/result.json").read_text())
    before.pop("curve")
    before.pop("sealed")
    for row in before["table"]:
        for name in ("budget", "sees", "cost"):
            row.pop(name)
    Path("old/result.json").write_text(json.dumps(before))
    assert tap("report", "old") == Exit.OK
    page = Path("old/report.html").read_text()
    assert "Accuracy against size: digits" in page
    assert "bits allocated anew" not in page


def test_a_terminal_shows_what_is_done_and_what_is_left(ended: Path, work: Path, cache: Path) -> None:
    arguments = ["apply", str(ended), "--budget", "2.7bit,3.3bit", "--draws", "2"]
    shown = in_terminal(arguments, work, cache, 120, until="Top-1 accuracy")
    assert "finding bits of digits: measured layer error" in shown
    assert "allocating bits of digits at 3.3bit" in shown
    assert re.search(r"measuring on the test split .* \d+/41 ", shown)  # 2 budgets, 2 draws, 10 allocations


def test_ranges_and_calibration_images_are_chosen_and_go_with_the_bits(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--activation-ranges", "omse", "--calibration", "distilled", "--baselines", "uniform"]
    assert tap("apply", "uniform:3", *DIGITS, *chosen, "--attention-activations", "8", "--out", "bits.json") == Exit.OK
    said = " ".join(capsys.readouterr().out.split())
    assert "calibration images are distilled: 16 a draw" in said
    written = json.loads((work / "bits.json").read_text())
    settings, (network,) = written["settings"], written["networks"]
    assert (settings["activation_ranges"], settings["attention_activations"]) == ("omse", "8")
    assert settings["networks"][0]["calibration"] == "distilled"
    assert network["operands"] == [], "it has no attention"
    assert tap("apply", "bits.json", "--out", "again.json") == Exit.OK
    assert "test images are right, as bits.json says" in " ".join(capsys.readouterr().out.split())
    (again,) = json.loads((work / "again.json").read_text())["networks"]
    assert again["layers"] == network["layers"]
    assert tap("apply", "bits.json", "--activation-ranges", "minmax", "--out", "usual.json") == Exit.OK
    (usual,) = json.loads((work / "usual.json").read_text())["networks"]
    assert usual["layers"][1]["input_scale"] > network["layers"][1]["input_scale"], "nothing is cut off"
    assert usual["images"]["calibration"] == network["images"]["calibration"]


def test_a_network_without_batch_normalization_is_not_calibrated_on_distilled_images(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["--network", "tests.tap_eval.baselines.small:Stopped", "--calibration", "distilled"]
    assert tap("apply", "uniform:3", *DIGITS, *network) == Exit.IMAGES
    assert "has no batch normalization" in capsys.readouterr().err
