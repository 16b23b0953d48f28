"""`table`: rows as `apply` measures them, searches that go on, figures of papers, and what cannot be measured."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import yaml

from tap_agent.exit import Exit
from tap_agent.report.lines import overview
from tap_agent.runs.folder import RunFolder
from tap_agent.sessions import apply as session
from tap_agent.sessions.resources import Resources
from tap_agent.sessions.rows import proxy_subjects
from tap_agent.sessions.subject import read_subject
from tap_agent.settings.read import read_settings
from tap_agent.tables.cited import cited, tables
from tap_agent.tables.course import proposals
from tap_agent.tables.line import Figure, Line, ordered
from tap_agent.tables.plan import ABLATIONS, NAMED, planned
from tap_agent.terminal.bar import Bar
from tests.tap_agent.program import GOOD, REPLAY, tap

SETTINGS = {
    "networks": [{"network": "digits", "search": 100, "test": 100}],
    "budget": "2.5bit,3.5bit",
    "bits": [2, 3, 4, 8],
    "calibration_draws": 2,
    "seed": 41,  # which no other test measures
    "baselines": ["uniform", "layer_error"],
}
SHOWN = (("top1", ".2f"), ("kl", ".3f"))
ROWS = {"title": "Small", "proxies": ["good.py", "channel_noise"], "cited": ["5"], "settings": SETTINGS}


def write(work: Path, plan: dict[str, Any]) -> None:
    (work / "good.py").write_text(GOOD)
    (work / "small.yaml").write_text(yaml.safe_dump(plan))


def kept(folder: Path) -> list[dict[str, Any]]:
    return parquet.read_table(folder / "table.parquet").to_pylist()


def values(cache: Path) -> int:
    with sqlite3.connect(cache / "measurements.sqlite") as database:
        (count,) = database.execute("SELECT count(*) FROM ledger WHERE value IS NOT NULL").fetchone()
    return int(count)


def measured(said: str) -> int:
    found = re.search(r"([\d,]+) values were measured", said)
    assert found
    return int(found[1].replace(",", ""))


def test_a_killed_table_goes_on_and_its_rows_are_what_apply_gives(
    work: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(work, ROWS)
    command = [sys.executable, "-m", "tap_agent", "table", "small.yaml", "--out", "small"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        assert any(line.startswith("allocating bits of digits at 3.5bit") for line in running.stdout)
        running.send_signal(signal.SIGKILL)
    before = values(cache)
    assert tap("table", "small.yaml", "--out", "small") == Exit.OK
    said = capsys.readouterr().out
    assert 0 < measured(said) == values(cache) - before
    assert "± is one standard deviation over 2 draws or seeds, fewer than a spread deserves" in said
    assert tap("table", "small.yaml", "--out", "again") == Exit.OK
    assert measured(capsys.readouterr().out) == 0
    rows = kept(work / "small")
    assert rows == kept(work / "again")

    settings = read_settings(None, {**SETTINGS, "networks": None, "search": 100, "test": 100})
    subject = read_subject("good.py")
    with Resources(session.opening(settings, 2), cache) as resources, Bar() as bar:
        applied = session.apply(subject, session.budgets(settings, settings.budget, subject), resources, 2, bar)
    table = {(row["budget"], row["row"], row["quantity"]): row for row in rows if row["kind"] != "cited"}
    assert len(applied.rows) == 7
    for row in applied.rows:
        label = "proxy good.py" if row.kind == "proxy" else row.label
        assert table[row.budget, label, "top1"]["values"] == [100 * top1 for top1 in row.draws]
        assert table[row.budget, label, "kl"]["values"] == row.kl_draws
        assert table[row.budget, label, "bits"]["mean"] == row.bits
        assert table[row.budget, label, "size"]["mean"] == row.size_bytes / 2**20
    by_hand = ["--bits", "2,3,4,8", "--search", "100", "--test", "100", "--seed", "41", "--draws", "2"]
    by_hand += ["--budget", "2.5bit", "--baselines", "uniform"]
    assert tap("apply", "good.py", *by_hand, "--out", "bits.json") == Exit.OK
    draws = json.loads((work / "bits.json").read_text())["networks"][0]["test_top1_by_calibration_draw"]
    assert table["2.5bit", "proxy good.py", "top1"]["values"] == [100 * top1 for top1 in draws]

    mine = table["2.5bit", "TAP-C (channel_noise)", "top1"]
    assert (mine["count"], mine["note"]) == (2, "found on cifar_resnet20, applied unchanged")
    cited = [row for row in rows if row["kind"] == "cited"]
    assert {row["network"] for row in cited} == {"mobilenet_v2"}
    assert all("Table 5" in row["source"] and "after training" in row["protocol"] for row in cited)
    markdown, page = ((work / "small" / f"table.{ending}").read_text() for ending in ("md", "html"))
    shown = f"{mine['mean']:.2f} ± {mine['spread']:.2f}"
    for text in (markdown, page, said):
        assert shown in text
        assert "EMQ (cited)" in text
    short = markdown[markdown.index("| row | network | sees | 2.5bit | 3.5bit |") :].partition("\n\n")[0]
    cells = {row.split(" | ")[0]: row.split(" | ")[3:] for row in short.splitlines()[2:]}
    both = [
        ", ".join(f"{table[budget, 'measured layer error', name]['mean']:{form}}" for name, form in SHOWN)
        for budget in ("2.5bit", "3.5bit")
    ]
    assert [re.sub(r" ± [\d.]+", "", cell.rstrip(" |")) for cell in cells["| measured layer error"]] == both
    assert [cell.split(",")[0] for cell in cells["| uniform bits"]] == ["W2A8", "W3A8"]
    assert not any("cited" in label for label in cells)
    assert not re.search(r"""(?:src|href)=["']?http""", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))


def test_an_overview_has_a_column_for_each_variant_where_the_budget_is_one() -> None:
    def line(variant: str, row: str, top1: float | None = None) -> Line:
        figures = {} if top1 is None else {"top1": Figure(values=(top1, top1 + 2))}
        return Line(network="digits", row=row, kind="baseline", budget="3bit", variant=variant, figures=figures)

    lines = [line("a", "earlier", 70), line("b", "earlier", 80), line("a", "ompq", 60), line("b", "ompq")]
    found = overview(lines)
    assert found
    assert (found.words, found.figures) == (("network", "budget"), ("a", "b"))
    assert {row.label: row.figures for row in found.rows} == {
        "earlier": ("71.00 ± 1.41", "81.00 ± 1.41"),
        "ompq": ("61.00 ± 1.41", ""),
    }
    assert overview(lines[::2]) is None


def test_searches_are_runs_that_are_kept_and_compared(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "networks": [{"network": "digits", "search": 100, "test": 100}],
        "population": 3,
        "generations": 1,
        "calibration_draws": 1,
        "llm": REPLAY,
    }
    vary = [{"controller": "ratio"}, {"controller": "uniform"}, {"budget": "1.5bit"}]
    write(
        work,
        {
            "title": "Controllers", "measures": "searches", "vary": vary, "against": vary[1], "seeds": 2,
            "settings": settings, "cited": ["3.3", "12"],
        },
    )  # fmt: skip
    assert tap("table", "small.yaml", "--seeds", "1", "--out", "small") == Exit.OK
    runs = {path.parent: path.stat().st_mtime_ns for path in (work / "small" / "runs").glob("*/result.json")}
    assert len(runs) == 2
    damaged, other = sorted(runs)
    for file in (damaged / "result.json", damaged / "checkpoints.sqlite"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert tap("table", "small.yaml", "--out", "small") == Exit.OK
    assert (damaged / "result.json.damaged").exists()
    assert RunFolder(damaged).finished()
    assert (other / "result.json").stat().st_mtime_ns == runs[other]
    table = {(row["variant"], row["quantity"]): row for row in kept(work / "small")}
    for variant in ("controller ratio", "controller uniform"):
        slug = variant.replace(" ", "-")
        results = [RunFolder(path).finished() for path in sorted((work / "small" / "runs").glob(f"{slug}-digits-*"))]
        assert [result.config["seed"] for result in results] == [0, 1]
        tops = [100 * row.test.top1 for result in results for row in result.table if row.kind == "proxy"]
        assert table[variant, "top1"]["values"] == tops
        assert table[variant, "proposals"]["values"] == [6, 6]  # and drafts beside them
        assert table[variant, "failed generation 0"]["count"] == 2
    assert "until_change" in {quantity for variant, quantity in table if variant == "controller ratio"}
    assert table["controller dpo", "within_change"]["values"] == [-25]
    assert table["controller ratio", "reached"]["count"] == 1
    assert "below what the smallest bits need" in table["budget 1.5bit", None]["note"]
    assert "2 searches of 2 generations of 3" in capsys.readouterr().out


def test_what_cannot_be_measured_says_why_beside_what_papers_say(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, paper in (("ptq", 70.26), ("qat", 72.63), ("vit", 83.56)):
        assert tap("table", name) == Exit.OK
        rows = kept(work / "tables" / name)
        assert {row["kind"] for row in rows if row["quantity"]} == {"cited"}
        assert paper in [row["mean"] for row in rows if row["quantity"] == "top1"]
        assert f"needs images at {work / 'data' / 'imagenet-val.parquet'}" in rows[0]["note"]
    assert "nobody has here" in (work / "tables" / "qat" / "table.md").read_text()
    networks = [*SETTINGS["networks"], {"network": "cifar_resnet20", "weights": "none.pt"}]  # type: ignore[misc]
    changed = {"networks": networks, "budget": "1.5bit,3bit", "baselines": ["uniform"]}
    write(work, {"title": "Two", "proxies": ["good.py"], "settings": SETTINGS | changed})
    assert tap("table", "small.yaml", "--draws", "1") == Exit.OK
    rows = kept(work / "tables" / "small")
    notes = {(row["network"], row["budget"]): row["note"] for row in rows if not row["quantity"]}
    assert "below what the smallest bits need" in notes["digits", "1.5bit"]
    assert f"needs weights at {work / 'none.pt'}, and nothing is there" in notes["cifar_resnet20", ""]
    assert [row["mean"] for row in rows if (row["row"], row["quantity"]) == ("proxy good.py", "top1")]
    assert "± is" not in (work / "tables" / "small" / "table.md").read_text()


def test_the_cost_of_finding_bits_is_over_seeds(work: Path, ended: Path) -> None:
    flags = ["--search", "60", "--test", "60", "--seeds", "2", "--baselines", "uniform,ompq,layer_error"]
    assert tap("table", "cost", "--out", "cost", "--proxy", str(ended), "--proxy", "paper", *flags) == Exit.OK
    table = {(row["row"], row["quantity"]): row for row in kept(work / "cost") if row["kind"] != "cited"}
    own = next(row for row, _ in table if row.startswith("TAP (run/"))
    for row in (own, "TAP-C (paper)"):
        assert table[row, "images"]["values"] == [16, 16]
        assert min(*(table[row, each]["values"] for each in ("describing", "scoring", "allocating"))) > [0, 0]
    assert table["OMPQ", "steps"]["count"] == 2
    assert ("OMPQ", "rounding") not in table
    assert min(table["measured layer error", "rounding"]["values"]) > 0
    assert table["search of run", "proposals"]["mean"] == len(proposals(RunFolder(ended).finished().candidates))


def test_runs_of_one_name_have_rows_of_their_own(ended: Path, tmp_path: Path) -> None:
    other = shutil.copytree(ended, tmp_path / "other" / ended.name)
    best = RunFolder(ended).finished().best
    (alone,) = proxy_subjects([str(ended), f"{ended}/"])
    assert alone.origin == f"{ended.name}/{best}"
    assert [each.origin for each in proxy_subjects([str(ended), "paper", str(other)])] == [
        f"{ended}/{best}", "paper", f"{other}/{best}",
    ]  # fmt: skip


def test_every_figure_of_the_paper_has_its_source() -> None:
    lines = cited(tables())
    assert {line.kind for line in lines} == {"cited"}
    assert all(line.source and line.protocol for line in lines)
    ordered(lines)  # which knows all quantities
    own = {"full precision", "TAP", "TAP-C"}
    assert {line.row for line in lines if not line.reference} == own
    of_table = {name: len(cited([name])) for name in tables()}
    assert [of_table[name] for name in ("3", "4", "5", "6", "8", "11")] == [30, 10, 5, 39, 14, 8]
    spread = next(line.figures["top1"] for line in cited(["9"]) if line.variant == "llm Deepseek-chat")
    assert round(spread.mean, 2) == 71.44  # the average that the paper prints
    (seconds,) = (line.figures["scoring"] for line in cited(["7"]))
    assert round(seconds.mean, 4) == 0.0133


def test_every_plan_that_comes_with_the_program_is_one() -> None:
    plans = [planned(name, None, None, {}) for name in NAMED]
    plans += [planned("ablation", name, None, {}) for name in ABLATIONS]
    assert all(each.plan.title and each.variants for each in plans)
    alpha = planned("ablation", "alpha", None, {})
    assert [variant.settings.alpha for variant in alpha.variants] == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1]
    other = planned("ablation", "alpha", None, {"alpha": 0.3, "budget": "4bit"})
    assert [(each.label, each.settings.budget) for each in other.variants] == [("alpha 0.3", "4bit")]
    of_one = planned("ptq", None, None, {"network": "resnet18", "budget": "3bit"})
    (network,) = of_one.variants[0].settings.networks
    assert (network.network, network.images.endswith("data/imagenet-val.parquet"), network.budget) == (
        "resnet18",
        True,
        None,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nobody"], Exit.CONFIG, "'nobody' is no table: give ptq, qat, vit, cost, ablation, or a plan of your own"),
        (["ablation", "nobody"], Exit.CONFIG, "'nobody' is no ablation: give some of alpha"),
        (["ptq", "alpha"], Exit.CONFIG, "ptq takes no alpha: give ablation before names of ablations"),
        (["none.yaml"], Exit.CONFIG, "none.yaml cannot be read"),
        (["small.yaml"], Exit.CONFIG, "the plan small.yaml: title: Field required"),
        (["ptq", "--seeds", "3"], Exit.CONFIG, "ptq has draws of calibration images in place of seeds: give --draws 3"),
        (["ablation", "alpha", "--proxy", "paper"], Exit.CONFIG, "searches proxies of its own: leave --proxy out"),
        (["ptq", "--weights", "x.pt"], Exit.CONFIG, "--weights does not say which of resnet18, mobilenet_v2"),
        (["ptq", "--network", "cifar_resnet20"], Exit.IMAGES, "cifar_resnet20 needs images: give --images"),
        (["ptq", "--network", "resnet18"], Exit.IMAGES, "put them there, or give --images parquet:PATH"),
        (["ptq", "--baselines", "hawqv2"], Exit.CONFIG, "baselines = 'hawqv2': 'hawqv2' is no baseline"),
        (["ablation", "rounding", "--proxy", "uniform:3"], Exit.PROXY, "'uniform:3' is no proxy"),
    ],
)
def test_a_mistake_is_a_sentence(
    arguments: list[str], code: Exit, words: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "small.yaml").write_text("settings: {}\n")
    assert tap("table", *arguments) == code
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert "goes on from here" not in said, "where it would fail again"
