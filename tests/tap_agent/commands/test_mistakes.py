"""One sentence and an exit code for each mistake, and what --help says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tap_agent.exit import Exit
from tap_agent.runs.folder import RunFolder
from tap_agent.settings.model import Settings
from tests.faults.faults import nobody
from tests.tap_agent.program import tap

ROOT = Path(__file__).parents[3]
MISTAKES: list[tuple[list[str], Exit, str]] = [
    (["--network", "resnet81"], Exit.NETWORK, "'resnet81' is an unknown network"),
    (["--network", "cifar_resnet20"], Exit.WEIGHTS, "--weights FILE"),
    (["--network", "cifar_resnet20", "--weights", "absent.pt"], Exit.WEIGHTS, "absent.pt does not exist"),
    (["--network", "cifar_resnet20", "--weights", "garbage.pt"], Exit.WEIGHTS, "cannot be read as a state dict"),
    (["--network", "cifar_resnet20", "--weights", "other.pt"], Exit.WEIGHTS, "does not fit cifar_resnet20"),
    (["--images", "nothing"], Exit.IMAGES, "'nothing' is no image source"),
    (["--images", "imagefolder:empty"], Exit.IMAGES, "no images in class folders"),
    (["--network", "tests.tap_eval.networks.test_load:tiny"], Exit.NETWORK, "does not run on images of shape"),
    (["--search", "5000"], Exit.IMAGES, "1,797 images"),
    (["--budget", "1.5bit"], Exit.BUDGET, "below what the smallest bits need, 2"),
    (["--budget", "99%"], Exit.BUDGET, "below what the smallest bits need, 93.75%"),
    (["--budget", "lots"], Exit.BUDGET, "'lots' is no budget"),
    (["--bits", "1,4"], Exit.BITS, "[1, 4] for weights"),
    (["--bits", "two"], Exit.CONFIG, "'two' are no bits"),
    (["--llm", "gpt-x"], Exit.MODEL, "set OPENAI_API_KEY"),
    (["--llm", "x", "--base-url", "http://127.0.0.1:9/v1"], Exit.MODEL, "http://127.0.0.1:9/v1 does not answer"),
    (["--llm", "x", "--base-url", "nonsense"], Exit.MODEL, "nonsense does not answer"),
    (["--executor", "ray", "--address", "127.0.0.1:9"], Exit.EXECUTOR, "127.0.0.1:9 does not answer"),
    (["--device", "gpu"], Exit.CONFIG, "'gpu' is no device: give auto, cpu, cuda, cuda:N or mps"),
    (["--device", "cuda:99"], Exit.DEVICE, "--device cuda:99: this machine, with the PyTorch that is installed, has"),
    (["--device", "cuda", "--executor", "ray"], Exit.DEVICE, "the workers of a Ray cluster measure on CPUs: leave it"),
    (["--baselines", "uniform,hawqv2"], Exit.CONFIG, "'hawqv2' is no baseline: perhaps hawq_v2; give all, fast, or"),
    (["--baselines", "uniform,"], Exit.CONFIG, "'' is no baseline"),
    (["--sandbox", "e2b"], Exit.SANDBOX, "E2B_API_KEY is not set"),
    (["--sandbox", "none"], Exit.CONFIG, "sandbox = 'none'"),
    (["--config", "absent.yaml"], Exit.CONFIG, "absent.yaml cannot be read"),
    (["--config", "typo.yaml"], Exit.CONFIG, "'genrations' in typo.yaml is an unknown setting: perhaps generations"),
    (["--config", "list.yaml"], Exit.CONFIG, "holds a list"),
    (["--config", "broken.yaml"], Exit.CONFIG, "is not YAML"),
    (["--config", "two.yaml", "--network", "digits"], Exit.CONFIG, "does not say which network"),
    (["--config", "date.yaml"], Exit.CONFIG, "the config date.yaml is not YAML (month must be in 1..12)"),
    (["--config", "deep.yaml"], Exit.CONFIG, "the config deep.yaml is not YAML"),
    (["--config", "twice.yaml"], Exit.CONFIG, "has budget in line 1 and in line 3: give each setting once."),
    (["--config", "flow.yaml"], Exit.CONFIG, "has seed in line 1 and in line 1: give each setting once."),
    (["--config", "empty.yaml"], Exit.CONFIG, "the config empty.yaml is not YAML"),
    (["--config", "bits.yaml"], Exit.CONFIG, "bits = [True, 4] in bits.yaml: that is no number: give one"),
    (["--config", "yes.yaml"], Exit.CONFIG, "population = True in yes.yaml: that is no number: give one"),
    (["--alpha", "2"], Exit.CONFIG, "alpha = 2.0"),
    (["--beta", "inf"], Exit.CONFIG, "beta = inf: input should be a finite number"),
    (
        ["--seed", "99999999999999999999"],
        Exit.CONFIG,
        "seed = 99999999999999999999: input should be less than or equal",
    ),
    (["--out", "x" * 300], Exit.RUN, "cannot be written"),
    (["--out", "two.yaml"], Exit.RUN, "two.yaml exists already: give another --out."),
    (["--base-url", "http://me:secret@host/v1"], Exit.CONFIG, "base_url: it is written to"),
    (["--base-url", "http://host/v1?key=secret"], Exit.CONFIG, "give the key in OPENAI_API_KEY"),
    (["--out", "garbage.pt/run"], Exit.RUN, "garbage.pt/run cannot be written"),
    (["--transform", "rezise=3"], Exit.CONFIG, "perhaps resize"),
    (["--transform", "resize=x"], Exit.CONFIG, "transform.resize = 'x'"),
    (["--calibration-images", "698"], Exit.IMAGES, "697 images to calibrate on and 698 are needed: give more, or --"),
    (["--calibration-images", "0"], Exit.CONFIG, "calibration_images = 0"),
    (
        ["--config", "rounding.yaml"],
        Exit.CONFIG,
        "input should be 'gptq' or 'nearest'",
    ),
    (["--rounding", "up"], Exit.USAGE, "'up' is not one of 'gptq', 'nearest'"),
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
    (work / "rounding.yaml").write_text("rounding: up\n")
    (work / "list.yaml").write_text("- 1\n")
    (work / "broken.yaml").write_text("a: [1\n")
    (work / "date.yaml").write_text("seed: 2026-13-45\n")
    (work / "deep.yaml").write_text("seed: " + "[" * 3000)
    (work / "twice.yaml").write_text("budget: 3bit\nseed: 1\nbudget: 2.5bit\n")
    (work / "flow.yaml").write_text("{seed: 1, seed: 2}\n")
    (work / "empty.yaml").write_text("seed: !!int ''\n")
    (work / "bits.yaml").write_text("bits: [yes, 4]\n")
    (work / "yes.yaml").write_text("population: yes\n")
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
        ("run", "--out", "."): (Exit.RUN, "exists already: give another --out."),
        ("apply", "bad.py", "--plot", "bad.py"): (Exit.RUN, "bad.py is read by this command"),
        ("apply", "uniform:3", "--out", "a.json", "--plot", "a.json"): (
            Exit.RUN,
            "a.json is read by this command, or would be written twice",
        ),
        ("report", "x[/b]"): (Exit.RUN, "x[/b] is no run folder"),
    }
    for arguments, (code, sentence) in cases.items():
        assert tap(*arguments) == code
        assert sentence in capsys.readouterr().err


@pytest.fixture
def shared(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which everybody may do anything, with a run that has not begun."""
    with tempfile.TemporaryDirectory() as folder:
        RunFolder.create(Path(folder) / "run", Settings())
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o777)
        monkeypatch.chdir(folder)
        yield Path(folder)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("run/config.yaml", "resume run"), ("run/result.json", "report run"), ("run/checkpoints.sqlite", "resume run"),
        ("proxy.py", "apply proxy.py"), ("some.parquet", "benchmark score --file some.parquet"),
    ],
)  # fmt: skip
def test_a_file_that_may_not_be_read_is_not_said_to_be_another_or_one_that_cannot_be_written(
    shared: Path, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    (shared / name).touch()
    (shared / name).chmod(0)
    with nobody():
        assert tap(*command.split()) == Exit.STORAGE
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(rf"{name} cannot be read \([^)]+\): see to its permissions, then go on\.", said), said


def test_a_run_of_another_user_hides_no_other(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shared / "run").rename(shared / "mine")
    RunFolder.create(shared / "theirs", Settings()).path.chmod(0)
    with nobody():
        assert tap("list", ".") == Exit.OK
    assert "mine" in capsys.readouterr().out


def test_a_folder_that_may_not_be_entered_hides_no_run(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private = shared / "run" / "private"
    private.mkdir(mode=0o700)
    (shared / "link").symlink_to(private / "within")
    with nobody():
        assert tap("list", ".") == Exit.OK
    assert "interrupted" in capsys.readouterr().out


def test_a_program_without_standard_streams_runs_all_the_same(work: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m tap_agent list <&- >&- 2>&-"], env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False, cwd=work,
    )  # fmt: skip
    assert done.returncode == Exit.OK


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


def test_help_waits_for_no_torch() -> None:
    code = "import sys, tap_agent.commands.app; sys.exit('torch' in sys.modules or 'langchain_core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
