"""`benchmark build` and `benchmark score`, as a person runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tap_agent.exit import Exit
from tests.tap_agent.program import GOOD, tap


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "digits.parquet"
    assert tap("benchmark", "build", "--out", str(path), "--count", "16", "--strata", "2", "--search", "200") == Exit.OK
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
        ("nobody", Exit.PROXY, "nobody is no proxy and no run"),
        ("direct", Exit.PROXY, "foretells no allocation but its own"),
        ("uniform:3", Exit.PROXY, "'uniform:3' is no proxy"),
        (str(broken), Exit.PROXY, "fails on digits"),
    ]:
        assert tap("benchmark", "score", what, "--file", str(file)) == code
        assert words in capsys.readouterr().err
    assert tap("benchmark", "score", "paper", "--file", str(tmp_path / "none.parquet")) == Exit.BENCHMARK
    for flags in (["--least", "4", "--most", "3"], ["--count", "5000", "--search", "200"]):
        assert tap("benchmark", "build", "--out", str(tmp_path / "x.parquet"), *flags) == Exit.BENCHMARK
    assert not (tmp_path / "x.parquet").exists()
