"""Files that a run leaves and that `apply` writes: the very figures again, the packed network, and what is no file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tap_agent.runs.result import Result
from tap_agent.sessions.export import file_names
from tap_agent.sessions.resources import Resources
from tap_agent.settings.model import Settings
from tap_eval.export.safetensors import described, read
from tests.agents.scripted import ChatServer
from tests.graphs.test_search import script
from tests.tap_agent.program import GOOD, REPLAY, SMALL, tap

DIGITS = ["--search", "100", "--test", "100"]


@pytest.fixture
def result(ended: Path) -> Result:
    return RunFolder(ended).finished()


def fresh(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in which nothing has been measured; the network is in it, which takes seconds to be trained again."""
    shutil.copytree(cache / "networks", folder / "fresh" / "networks")
    monkeypatch.setenv("TAP_CACHE", str(folder / "fresh"))


def test_a_file_gives_the_very_figures_again_from_nothing_but_itself(
    ended: Path,
    work: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(ended / "best.json", "moved.json")
    first = json.loads(Path("moved.json").read_text())["networks"][0]
    fresh(cache, tmp_path, monkeypatch)
    assert tap("apply", "moved.json", "--out", "again.json") == Exit.OK
    said = f"digits: {first['test']['correct']} of 200 test images are right, as moved.json says"
    assert said in capsys.readouterr().out
    again = json.loads(Path("again.json").read_text())["networks"][0]
    scales = [layer.pop("weight_scales") for layer in again["layers"]]
    assert all(len(each) == layer["shape"][0] for each, layer in zip(scales, again["layers"], strict=True))
    same = ("test", "layers", "images", "weights_digest", "measured_on", "size_parts", "weight_bits")
    assert {name: again[name] for name in same} == {name: first[name] for name in same}


@pytest.mark.parametrize(
    "given",
    [
        ["uniform:3", "--rounding", "nearest", "--no-finish", "--calibration-images", "12"],
        ["uniform:5", "--draws", "3", "--seed", "4"],
        ["GOOD", "--budget", "2.7bit", "--activation-bits", "6", "--transform", "mean=0.4,std=0.6"],
    ],
    ids=lambda given: " ".join(given),
)
def test_what_apply_writes_gives_its_figures_again_without_a_flag(
    given: list[str],
    work: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (work / "good.py").write_text(GOOD)
    arguments = ["good.py" if each == "GOOD" else each for each in given]
    assert tap("apply", *arguments, *DIGITS, "--out", "bits.json") == Exit.OK
    fresh(cache, tmp_path, monkeypatch)
    assert tap("apply", "bits.json", "--out", "again.json") == Exit.OK
    assert "of 100 test images are right, as bits.json says" in capsys.readouterr().out
    first, again = (json.loads(Path(name).read_text()) for name in ("bits.json", "again.json"))
    assert first["networks"][0]["layers"] == again["networks"][0]["layers"]  # scales, to the last digit
    assert first["networks"][0]["test"] == again["networks"][0]["test"]
    assert first["settings"] == again["settings"]


def test_a_model_file_is_the_same_as_the_one_that_the_run_left(ended: Path, result: Result, work: Path) -> None:
    file, onnx = result.files
    left = (ended / file.name).read_bytes()
    assert (file.name, file.size_bytes) == ("model.safetensors", len(left))
    assert file.sha256 == hashlib.sha256(left).hexdigest()
    assert json.loads((ended / "best.json").read_text())["networks"][0]["files"] == [
        each.model_dump() for each in (file, onnx)
    ]
    assert (onnx.name, onnx.size_bytes) == ("model.onnx", (ended / "model.onnx").stat().st_size)
    assert tap("apply", str(ended / "best.json"), "--out", "new/model.safetensors") == Exit.OK
    assert (work / "new" / "model.safetensors").read_bytes() == left
    (proxy,) = [row for row in result.table if row.kind == "proxy"]
    header = 8 + int.from_bytes(left[:8], "little")
    assert len(left) - header == proxy.size_bytes


def test_a_model_file_classifies_as_it_says(ended: Path, work: Path, cache: Path) -> None:
    settings = RunFolder(ended).settings()
    with Resources(settings, cache) as resources:
        (bench,) = resources.benches
        network, test = read(ended / "model.safetensors", bench.prepared), bench.splits.test
        correct = int((network.logits(test.pixels, 100).argmax(1) == test.labels).sum())
    told = described(ended / "model.safetensors").about
    assert json.loads(told["test"])["correct"] == correct
    assert json.loads(told["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(told["input"]) == [1, 8, 8]
    assert json.loads(told["transform"])["mean"] == [0.5]


@pytest.mark.parametrize("weights", [None, "packed", "native", "int8"])
def test_a_file_of_onnx_classifies_as_it_says(
    weights: str | None, ended: Path, result: Result, work: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ended / "model.onnx"
    if weights:
        path = work / "new.onnx"
        assert tap("apply", str(ended / "best.json"), "--out", str(path), "--onnx-weights", weights) == Exit.OK
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with Resources(RunFolder(ended).settings(), cache) as resources:
        test = resources.benches[0].splits.test
        (logits,) = session.run(["logits"], {"pixels": test.pixels.numpy()})
    told = session.get_modelmeta().custom_metadata_map
    assert abs(int((logits.argmax(1) == test.labels.numpy()).sum()) - json.loads(told["test"])["correct"]) <= 1
    assert json.loads(told["classes"]) == [str(digit) for digit in range(10)]
    capsys.readouterr()
    assert tap("inspect", str(path)) == Exit.OK
    assert "classifier" in capsys.readouterr().out


def test_a_program_of_torch_classifies_as_it_says(
    ended: Path, work: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tap("apply", str(ended / "best.json"), "--out", "model.pt2") == Exit.OK
    said = " ".join(capsys.readouterr().out.split())
    best = json.loads((ended / "best.json").read_text())["networks"][0]
    assert (
        f"{Path('model.pt2').stat().st_size:,} bytes in all, where the packed network has {best['size_bytes']:,}"
        in said
    )
    with Resources(RunFolder(ended).settings(), cache) as resources:
        test = resources.benches[0].splits.test
        logits = torch.export.load("model.pt2").module()(test.pixels)
    assert abs(int((logits.argmax(1) == test.labels).sum()) - best["test"]["correct"]) <= 1
    assert tap("inspect", "model.pt2") == Exit.OK
    shown = " ".join(capsys.readouterr().out.split())
    assert "weights are stored as int8, compressed" in shown
    assert f'"correct": {best["test"]["correct"]}' in shown


def test_several_networks_have_a_file_each(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"network": "digits", "search": 100, "test": 100}
    (work / "two.yaml").write_text(yaml.safe_dump({"networks": [network, network]}))
    assert tap("apply", "uniform:4", "--config", "two.yaml", "--out", "m.safetensors") == Exit.OK
    assert sorted(path.name for path in work.glob("m*")) == ["m-digits-2.safetensors", "m-digits.safetensors"]
    assert capsys.readouterr().out.count("model: ") == 2
    assert file_names("m", ".x", ["a:b", "a/b"]) == ["m-1-a-b.x", "m-2-a-b.x"]


def test_what_differs_from_what_a_file_was_measured_on_is_said(
    ended: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = json.loads((ended / "best.json").read_text())
    network = best["networks"][0]
    network["weights_digest"] = "0123456789abcdef"
    network["images"]["test"]["digest"] = "0"
    network["images"]["calibration"]["digest"] = "0"
    network["measured_on"] = {"path": "simulated", "device": "cuda"}
    best["settings"]["device"] = "cuda:99"  # which is not here
    best["provenance"]["versions"]["quantizer"] = 1
    (work / "bits.json").write_text(json.dumps(best))
    assert tap("apply", "bits.json") == Exit.OK
    said = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "than those that bits.json was written of (01234567): its bits are taken, and its figures",
        "digits: the calibration images are not those of bits.json",
        "digits: the test images are not those of bits.json",
        "digits was measured on the simulated path on cuda, and is here on the integer path on cpu",
        "version 1 of the quantizer wrote bits.json",
    ):
        assert sentence in said
    assert "test images are right" not in said


def test_a_file_of_before_figures_could_be_repeated_is_applied_as_it_was(
    ended: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = json.loads((ended / "best.json").read_text())
    kept = {"name", "params", "weight_bits", "activation_bits"}
    layers = [{name: layer[name] for name in kept} for layer in new["networks"][0]["layers"]]
    (work / "old.json").write_text(json.dumps({"networks": [{"network": "digits", "layers": layers}]}))
    assert tap("apply", "old.json", *DIGITS) == Exit.OK
    said = capsys.readouterr().out
    assert re.search(r"old\.json +│", said)
    assert "not those of" not in said
    assert tap("inspect", "old.json") == Exit.OK
    assert "classifier" in capsys.readouterr().out


def test_no_key_is_in_what_a_run_leaves(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-user")
    with ChatServer(script) as server:
        llm = ["--llm", "scripted", "--base-url", server.url]
        assert tap("run", *SMALL, *llm, "--seed", "3", "--out", "run") == Exit.OK
        for file in (work / "run").rglob("*"):
            assert not file.is_file() or b"sk-secret" not in file.read_bytes(), file
        for name in ("best.json", "model.safetensors", "model.onnx"):
            assert server.url.encode() not in (work / "run" / name).read_bytes()
    settings = json.loads((work / "run" / "best.json").read_text())["settings"]
    assert not settings.keys() & {"llm", "base_url", "prices", "address"}


def test_a_run_whose_network_cannot_be_written_ends_all_the_same(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = "tests.tap_agent.commands.unwritable:network"
    assert tap("run", *SMALL, "--llm", REPLAY, "--network", network, "--out", "run") == Exit.OK
    why = "two tensors of the network are called conv.weight_scale in the file"
    assert why in capsys.readouterr().out
    found = RunFolder(work / "run").result()
    assert found
    assert found.files == []
    assert all(why in sentence for sentence in found.unwritten)
    assert why in (work / "run" / "report.html").read_text()
    assert tap("apply", "run", "--out", "model.safetensors") == Exit.EXPORT
    assert why in capsys.readouterr().err


def rows(printed: str) -> dict[str, str]:
    """Lines of a table of layers, by the layer."""
    return {line.split()[0]: line for line in printed.splitlines() if line.strip() and len(line.split()) > 6}


def test_inspect_shows_a_run_its_file_and_its_bits(ended: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = json.loads((ended / "best.json").read_text())["networks"][0]
    assert tap("inspect", str(ended)) == Exit.OK
    of_run = capsys.readouterr().out
    assert tap("inspect", str(ended / "model.safetensors")) == Exit.OK
    of_file = capsys.readouterr().out
    assert of_file.strip() in of_run
    size = (ended / "model.safetensors").stat().st_size
    overhead = size - best["size_bytes"]
    summed = f"uint8, packed; {best['size_bytes']:,} bytes of values; {overhead:,} bytes of names"
    assert summed in " ".join(of_file.split())
    assert f'"correct": {best["test"]["correct"]}' in of_file
    assert best["weights_digest"] in of_file
    assert tap("inspect", str(ended / "best.json")) == Exit.OK
    of_bits = capsys.readouterr().out
    assert f"{best['size_bytes']:,} bytes of values" in of_bits
    for layer in best["layers"]:
        scale, zero, top = layer["input_scale"], layer["input_zero_point"], 2 ** layer["activation_bits"] - 1
        reach = f"{-scale * zero:.2g} to {scale * (top - zero):.2g}, {layer['activation_bits']} bits"
        for table in (rows(of_file), rows(of_bits)):
            line = " ".join(table[layer["name"]].split())
            assert f"{layer['kind']} {'x'.join(map(str, layer['shape']))} " in line
            assert line.endswith(reach.replace("-0 to", "0 to"))
            of_layer = {layer["weight_bits"]} if isinstance(layer["weight_bits"], int) else set(layer["weight_bits"])
            assert all(re.search(rf"\b{bits}\b", line) for bits in of_layer)


def test_sums_in_integers_are_shown_alike_of_every_file(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("sums.safetensors", "sums.onnx", "sums.json")
    for name in names:
        assert tap("apply", "uniform:4", *DIGITS, "--sums", "int8", "--out", name) == Exit.OK
    network = json.loads((work / "sums.json").read_text())["networks"][0]
    (value,) = network["between"]
    assert (value["name"], value["then"], value["input_of"]) == ("blocks.3.1.0.output", ["relu"], None)
    reach = f"0 to {255 * value['scale']:.2g}, 8 bits"
    for name in names:
        capsys.readouterr()
        assert tap("inspect", name) == Exit.OK
        said = capsys.readouterr().out
        (line,) = [line for line in said.splitlines() if line.strip().startswith("blocks.3.1.0") and "x48x" not in line]
        assert " ".join(line.split()).endswith(f"8 5 {reach}"), name
        assert f"{network['size_bytes']:,} bytes of values" in said


def test_what_is_in_float_is_named_and_refused_where_nothing_may_be(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["uniform:4", *DIGITS, "--sums", "float", "--out"]
    assert tap("apply", *given, "x.onnx") == Exit.OK
    said = " ".join(capsys.readouterr().out.split())
    assert "multiplied in float32 by ONNX Runtime" in said
    assert "1 mean, of which --sums int8 has 1 in 8 bits" in said
    (work / "x.onnx").unlink()
    for arguments, sentence in [
        ([*given, "x.onnx", "--strict"], "x.onnx would not be all in integers, which strict asks for"),
        ([*given, "x.safetensors", "--strict"], "x.safetensors would not be all in integers"),
        ([*given, "x.json", "--strict"], "'x.json' is for bits, of which none are in float32: leave out --strict"),
        (["uniform:4", "--strict"], "--strict is about a file of the network: give --out"),
    ]:
        assert tap("apply", *arguments) == Exit.EXPORT
        printed = capsys.readouterr()
        assert sentence in " ".join(printed.err.split())
        assert "W4A8" not in printed.out  # refused before anything was measured
    native = ["x.onnx", "--strict", "--onnx-weights", "native"]
    assert tap("apply", "uniform:2", *DIGITS, "--out", *native) == Exit.EXPORT
    printed = capsys.readouterr()
    assert "multiplied in float32 by ONNX Runtime" in " ".join(printed.err.split())
    assert "W2A8" in printed.out  # what only the file could tell costs no table
    assert not list(work.glob("*x.*"))
    assert tap("apply", "uniform:4", *DIGITS, "--out", "x.onnx", "--strict") == Exit.OK
    assert "float32" not in capsys.readouterr().out.partition("model: ")[2]


def test_inspect_says_where_a_runs_file_is_another(ended: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ended, "run")
    assert tap("apply", "uniform:4", *DIGITS, "--out", "run/model.safetensors") == Exit.OK
    capsys.readouterr()
    assert tap("inspect", "run") == Exit.OK
    assert "run/model.safetensors is not the file that the run wrote" in capsys.readouterr().out
    Path("run/model.safetensors").unlink()  # as in runs of before
    Path("run/model.onnx").unlink()
    assert tap("inspect", "run") == Exit.OK
    assert "run/best.json: an allocation, without weights" in capsys.readouterr().out


def test_what_cannot_be_written_or_read_is_one_sentence_and_an_exit_code(
    ended: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = json.loads((ended / "best.json").read_text())
    best["networks"][0]["layers"][0]["params"] = 5
    (work / "other.json").write_text(json.dumps(best))
    best["settings"] = {"nonsense": 1}
    (work / "odd.json").write_text(json.dumps(best))
    (work / "file").write_text("")
    (work / "folder.json").mkdir()
    (work / "bad.safetensors").write_bytes(b"0123456789")
    RunFolder.create(work / "begun", Settings())
    short = ["uniform:4", *DIGITS, "--out"]
    cases: list[tuple[list[str], Exit, str]] = [
        (
            ["apply", *short, "bits.txt"],
            Exit.EXPORT,
            "'bits.txt' ends in .txt, which says nothing of what to write: give",
        ),
        (["apply", *short, "bits"], Exit.EXPORT, "'bits' has no ending"),
        (["apply", *short, "file/x.safetensors"], Exit.RUN, "file/x.safetensors cannot be written"),
        (["apply", *short, "folder.json"], Exit.RUN, "folder.json is a folder: give --out the name of a file"),
        (["apply", "other.json", "--out", "x.safetensors"], Exit.PROXY, "it has 5 weights in layer stem.0"),
        (["apply", "odd.json"], Exit.CONFIG, "'nonsense' in odd.json is an unknown setting"),
        (["apply", "begun", "--out", "x.safetensors"], Exit.RUN, "begun has not ended: continue it with"),
        (["run", *SMALL, "--llm", REPLAY, "--out", "file/run"], Exit.RUN, "file/run cannot be written"),
        (["inspect", "begun"], Exit.RUN, "begun has not ended: continue it with"),
        (["inspect", "."], Exit.RUN, ". is no run folder"),
        (["inspect", "nowhere"], Exit.EXPORT, "nowhere is nothing to look into: give a run's folder, a .safetensors"),
        (["inspect", "file"], Exit.EXPORT, "file is nothing to look into"),
        (["inspect", "nowhere.json"], Exit.EXPORT, "nowhere.json cannot be read"),
        (["inspect", "bad.safetensors"], Exit.EXPORT, "bad.safetensors is not safetensors, or cut off"),
        (["inspect", "nowhere.safetensors"], Exit.EXPORT, "nowhere.safetensors cannot be read"),
    ]
    for arguments, code, sentence in cases:
        assert tap(*arguments) == code, arguments
        said = capsys.readouterr()
        assert sentence in " ".join(said.err.split()), arguments
        assert "opening" not in said.out
        assert "Top-1" not in said.out  # before the work
    assert not [path for path in work.iterdir() if path.name.startswith(("x", ".new", "bits", "runs"))]


def test_a_run_in_a_folder_that_takes_no_files_is_not_resumed(
    ended: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ended, "run")
    for name in ("result.json", ".lock"):
        Path("run", name).unlink()
    Path("run/.lock").mkdir()  # as on a disk that is read only: the lock cannot be opened
    assert tap("resume", "run") == Exit.RUN
    assert "run cannot be written" in capsys.readouterr().err


def test_a_file_of_onnx_without_its_extra_names_it(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tap_eval.export.extra.find_spec", lambda name: None)
    for arguments in (["apply", "uniform:4", "--out", "x.onnx"], ["inspect", "x.onnx"]):
        assert tap(*arguments) == Exit.EXPORT
        assert "onnx, onnxscript, onnxruntime" in (said := capsys.readouterr().err)
        assert "pip install 'tap-agent[onnx]'" in said


def test_a_resumed_run_leaves_the_file_of_one_that_was_not_stopped(ended: Path, work: Path) -> None:
    shutil.copytree(ended, "run")
    for name in ("result.json", "best.json", "report.html", "model.safetensors", "model.onnx"):
        Path("run", name).unlink()
    assert tap("resume", "run") == Exit.OK
    for name in ("model.safetensors", "model.onnx"):
        assert Path("run", name).read_bytes() == (ended / name).read_bytes()
