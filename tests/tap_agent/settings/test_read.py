"""Settings from a config and from flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from tap_agent.settings.read import dump, read_settings
from tap_eval.images.images import Transform


def test_flags_win_over_a_config_and_what_is_written_is_read_again(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("networks: [{search: 9, test: 8}]\nbits: [2, 8]\nseed: 4\n")
    settings = read_settings(config, {"test": 7, "transform": "resize=32, crop=28", "bits": "2,3,4", "seed": None})
    (network,) = settings.networks
    assert (network.search, network.test, network.transform) == (9, 7, Transform(resize=32, crop=28))
    assert (settings.bits, settings.seed) == ((2, 3, 4), 4)
    config.write_text(dump(settings))
    assert read_settings(config, {}) == settings


@pytest.mark.parametrize(
    ("llm", "stays"),
    [
        (None, True), ("another", True), ("library/another:8b", True), ("deepseek:another", False),
        ("ollama:another", False), ("openai:a,openai:b", False), ("a@http://elsewhere/v1", False),
        ("http://elsewhere/v1", False), ("embedded", False), ("replay:file.jsonl", False),
    ],
)  # fmt: skip
def test_a_model_that_says_where_it_is_served_is_not_asked_at_the_address_of_the_one_before(
    llm: str | None, stays: bool, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("llm: mine\nbase_url: http://here/v1\n")
    assert read_settings(config, {"llm": llm}).base_url == ("http://here/v1" if stays else None)
    given = read_settings(config, {"llm": llm, "base_url": "http://there/v1"})
    assert given.base_url == "http://there/v1"
