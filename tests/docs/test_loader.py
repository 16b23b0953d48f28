"""The loader in docs/deploy.md is short, needs no TAP, and reads what TAP wrote."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tap_eval.export.safetensors import write
from tests.docs.pages import ROOT, blocks
from tests.tap_eval.export.test_safetensors import branchy, mixed, quantized


@pytest.fixture
def code() -> str:
    (block,) = [block for block in blocks((ROOT / "docs/deploy.md").read_text()) if block.title == "packed.py"]
    return block.text


def test_the_loader_is_forty_lines_at_most_and_needs_no_tap(code: str) -> None:
    assert len(code.splitlines()) <= 40
    imported = {
        each.split(".")[0]
        for node in ast.walk(ast.parse(code))
        for each in (
            [node.module or ""] if isinstance(node, ast.ImportFrom)
            else [name.name for name in node.names] if isinstance(node, ast.Import) else []
        )
    }  # fmt: skip
    assert imported == {"json", "numpy", "safetensors"}


@pytest.mark.parametrize("choices", [(2, 3, 8), (4, 5, 6), (7,)])
def test_the_loader_gives_what_tap_has(code: str, choices: tuple[int, ...], tmp_path: Path) -> None:
    loader: dict[str, Any] = {}
    exec(compile(code, "packed.py", "exec"), loader)
    prepared = branchy()
    allocation = mixed(prepared, *choices)
    network = quantized(prepared, allocation)
    write(tmp_path / "model.safetensors", network, allocation, {})

    layers, in_float = loader["load"](tmp_path / "model.safetensors")

    assert list(layers) == [layer.name for layer in prepared.layers]
    for found, own in zip(layers.values(), network.layers, strict=True):
        assert own.weight is not None
        assert own.affine is not None
        assert found["integers"].dtype == np.int8
        assert np.array_equal(found["integers"], own.weight.integers.numpy())
        assert np.array_equal(found["scale"], own.weight.scale.numpy())
        assert np.array_equal(found["bias"], own.weight.bias.numpy())
        assert found["input"] == (np.float32(own.affine.scale), own.affine.zero_point)
        real = loader["real_weight"](found)
        assert real.dtype == np.float32
        assert np.array_equal(real, own.weight.real().numpy())
    assert in_float.keys() == prepared.in_float().keys()
    assert np.array_equal(in_float["gain"], prepared.in_float()["gain"].numpy())
