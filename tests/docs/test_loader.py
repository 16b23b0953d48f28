"""The loader in docs/deploy.md is short, needs no TAP, and reads what TAP wrote."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tap_eval.export.safetensors import write
from tests.docs.pages import ROOT, blocks
from tests.tap_eval.export.test_safetensors import branchy, mixed, quantized, summed
from tests.tap_eval.quantization.test_sums import Residual


def block_of(title: str) -> str:
    (block,) = [block for block in blocks((ROOT / "docs/deploy.md").read_text()) if block.title == title]
    return block.text


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "a block of Python", "exec"), names)
    return names


@pytest.fixture
def code() -> str:
    return block_of("packed.py")


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
    loader = run(code)
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


@pytest.mark.parametrize("activations", [8, 5])
def test_a_file_with_sums_in_integers_is_enough_to_compute_what_the_network_computes(
    code: str, activations: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, allocation = summed(Residual(), activations)
    write(tmp_path / "model.safetensors", network, allocation, {})
    layers, _ = run(code)["load"](tmp_path / "model.safetensors")
    told = run(block_of("between.py"))
    values = told["load"](tmp_path / "model.safetensors")
    padding = {"stem": 1, "first": 1, "down": 1}

    def layer(name: str, x: Tensor) -> Tensor:
        own = layers[name]
        scale, zero = (float(each) for each in own["input"])
        x = (x / scale + zero).round().clamp(0, 2**activations - 1) - zero
        weight, bias = (torch.from_numpy(own[each]).double() for each in ("integers", "bias"))
        factor = scale * torch.from_numpy(own["scale"]).double()
        if name == "last":
            return F.linear(x, weight) * factor + bias
        y = F.conv2d(x, weight, None, own["structure"]["stride"], padding.get(name, 0))
        return y * factor.view(-1, 1, 1) + bias.view(-1, 1, 1)

    def between(name: str, x: Tensor) -> Tensor:
        _, scale, zero = values[name]
        return torch.from_numpy(told["rounded"](x.numpy(), float(scale), int(zero)))

    def forward(x: Tensor) -> Tensor:
        """As `Residual` has it."""
        x = between("stem.output", F.max_pool2d(layer("stem", x).relu(), 2))
        x = between("second.add", (between("second.output", layer("second", layer("first", x).relu())) + x).relu())
        y = between("down.output", layer("down", x).clamp(0, 6))
        z = between("again.output", layer("again", y))
        x = between("again.add", (z + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).clamp(0, 6))
        return layer("last", between("again.add:1", x + y).mean((2, 3)))

    pixels = torch.rand(20, 3, 16, 16)
    wanted = network.logits(pixels, 4)
    off = (forward(pixels.double()) - wanted).abs().amax(1) / wanted.abs().max()
    assert (off < 1e-4).double().mean() > 0.5, "but for single roundings"
    assert off.max() < 0.1
