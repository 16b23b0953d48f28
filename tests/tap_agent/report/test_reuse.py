"""Proxies to take to another network, as the report of a run offers them."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import pytest

from tap_agent.exit import Exit
from tap_agent.report.reuse import reusable, shipped
from tap_agent.runs.folder import RunFolder
from tap_eval.proxies.published import NAMES
from tests.tap_agent.program import tap


def test_the_commands_of_a_report_run_in_its_folder(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.path)
    found = re.findall(r'<pre class="command">(.*?)</pre>', Path("report.html").read_text())
    commands = [shlex.split(html.unescape(command)) for command in found]
    assert [words[2] for words in commands[-len(NAMES) :]] == list(NAMES)
    result = run.finished()
    assert commands[0][2] == f"proxies/{result.best}.py"
    for program, *words in (commands[0], commands[-len(NAMES)]):
        assert program == "tap-agent"
        given = ["digits" if word == "NETWORK" else word for word in words]
        assert tap(*given, "--search", "200", "--test", "200") == Exit.OK
        assert f"│ {words[1]} " in capsys.readouterr().out


def test_those_of_a_run_differ_in_how_they_rank_layers(run: RunFolder) -> None:
    result = run.finished()
    best = result.candidate(result.best)
    assert best.fitness
    scaled, turned = ([[way * score for score in scores] for scores in best.scores] for way in (10.0, -1.0))
    moved = [[*scores[3:], *scores[:3]] for scores in best.scores]
    others = {
        "x000": {"scores": scaled},
        "x001": {"scores": turned},
        "x002": {"scores": moved, "fitness": best.fitness / 2},
        "x003": {"scores": moved, "fitness": best.fitness / 4},
        "x004": {"scores": [[*scores[5:], *scores[:5]] for scores in best.scores], "dropped": True},
    }
    made = [best.model_copy(update={"name": name, **each}) for name, each in others.items()]
    offered = reusable(result.model_copy(update={"candidates": [best, *made]}))
    assert [each.name for each in offered] == [best.name, "x002"]
    assert offered[1].command == "tap-agent apply proxies/x002.py --network NETWORK --budget 3bit"


@pytest.mark.parametrize(
    ("budget", "bits", "flags"),
    [("2.5bit", [2, 3, 4, 8], " --budget 2.5bit --bits 2,3,4,8"), ("0.01MB", [2, 4, 8], "")],
)
def test_a_command_has_the_bits_of_the_run_and_its_budget_where_other_networks_can_have_it(
    run: RunFolder, budget: str, bits: list[int], flags: str
) -> None:
    result = run.finished()
    network = result.networks[0].model_copy(update={"budget": budget})
    changed = result.model_copy(update={"networks": [network], "config": {**result.config, "bits": bits}})
    assert shipped(changed)[0].command == f"tap-agent apply paper --network NETWORK{flags}"
