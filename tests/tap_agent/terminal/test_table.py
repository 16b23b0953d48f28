"""Tables of many runs in terminals of any width."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from tap_agent.tables.line import Figure, Line
from tap_agent.tables.plan import Plan
from tap_agent.terminal import table
from tap_agent.terminal.table import print_lines


@pytest.mark.parametrize("width", [40, 80, 240])
def test_nothing_is_cut_off_where_the_terminal_is_narrow(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "out", Console(width=width))
    figures = {
        name: Figure(values=(value, value + 1, value + 2))
        for name, value in (("top1", 87.62), ("kl", 0.256), ("images", 1200000), ("steps", 737), ("seconds", 21.6))
    }
    line = Line(
        network="cifar_resnet20",
        row="a rule with a name of several words",
        kind="baseline",
        budget="2.25bit",
        variant="rounding gptq, finish false, 网络配置文件名称很长很长",
        bits="*/8",
        sees="weights, images, labels, Hessian",
        figures=figures,
        note="a note of it",
    )
    print_lines(Plan(title="Some rows", measures="allocations"), [line])
    said = capsys.readouterr().out
    assert "…" not in said
    assert "".join(re.findall(r"[\u4e00-\u9fff]", said)) == "网络配置文件名称很长很长"
    words = [
        *line.row.split(),
        *line.variant.split()[:4],
        *line.sees.split(),
        "2.25bit",
        "*/8",
        "88.62 ± 1.00",
        "738 ± 1",
    ]
    assert [word for word in words if word not in said] == []
    assert "[1] a note of it" in said
    assert (line.row in said) == (width == 240)
