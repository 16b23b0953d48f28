"""What attention multiplies is in 8 bits on every path, and nothing else of it; off is the network as it was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer

from tap_eval import quantize
from tap_eval.allocation.choices import uniform
from tap_eval.export import safetensors
from tap_eval.export.safetensors import described
from tap_eval.measuring.recorder import Recorder
from tap_eval.mistake import ExportMistake
from tap_eval.preparing.operands import attended
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared, attending
from tap_eval.preparing.program import record
from tap_eval.quantization.agreement import multiplied_otherwise, recorded_otherwise
from tap_eval.quantization.calibration import calibrate, calibrate_operands
from tap_eval.quantization.finishing import finish
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights
from tap_eval.quantization.quantizer import Affine, QuantizedNetwork
from tests.tap_eval.preparing.networks import Functional, Net, SplitBias, attention, encoder
from tests.tap_eval.quantization.test_integer import MOST, vit


class Plain(nn.Module):
    """Attention of one head, alone between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1).unflatten(1, (-1, 8))).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))


class Products(nn.Module):
    """Products of two activations by other functions, and one of an activation and a constant."""

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.baddbmm(torch.ones(1, 16, 16), x, x.transpose(1, 2)).softmax(-1)
        y = torch.einsum("bts,bsc->btc", [scores, x]) + torch.bmm(scores, mat2=x)
        return y + torch.eye(16) @ x


def swin() -> nn.Module:
    return SwinTransformer([4, 4], 16, [1, 2], [2, 2], [4, 4], num_classes=5)


def of_timm() -> nn.Module:
    return timm.models.VisionTransformer(32, 8, num_classes=5, embed_dim=32, depth=2, num_heads=4)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "torchvision's ViT": (vit, 32, 2 * 4),
    "torchvision's Swin": (swin, 32, 3 * 4),
    "timm's ViT": (of_timm, 32, 2 * 4),
    "weights of heads returned": (
        lambda: Net(Functional(attention(), lambda layer, x: layer(x, x, x)[0]), 8, tokens=True), 16, 4
    ),
    "masked": (
        lambda: Net(
            Functional(attention(), lambda f, x: f(x, x, x, attn_mask=torch.ones(16, 16).triu(1).bool(),
                                                   need_weights=False)[0]), 8, tokens=True), 16, 4,
    ),
    "encoder": (lambda: Net(encoder(batch_first=True), 8, tokens=True), 16, 4),
    "bias put together": (lambda: Net(SplitBias(), 8, tokens=True), 16, 4),
    "other functions": (lambda: Net(Products(), 8, tokens=True), 16, 6),
    "none": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 3)), 16, 0),
}  # fmt: skip


def made(name: str) -> tuple[Prepared, Tensor]:
    torch.manual_seed(0)
    make, size, _ = NETWORKS[name]
    images = torch.randn(12, 3, size, size)
    return prepare(make().eval(), images[:2], [images]), images


@pytest.mark.parametrize("name", NETWORKS)
def test_the_operands_of_attention_are_found_and_off_is_the_network_as_it_was(name: str) -> None:
    prepared, images = made(name)
    named = attending(prepared)
    assert len(set(named.operands)) == len(named.operands) == NETWORKS[name][2]
    assert torch.equal(prepared(images), named(images))
    assert prepared.operands == ()
    program = record(named, images)
    assert [step.operand for step in program.steps if step.operand is not None] == list(range(len(named.operands)))
    assert recorded_otherwise(named, program, images) is None

    off = QuantizedNetwork(prepared, calibrate(prepared, images))
    off.choose(uniform(prepared.layers, 4))
    plain = prepared(images, off.layers)
    assert torch.equal(off.logits(images, 12), plain)
    on = QuantizedNetwork(named, calibrate(named, images), operands=calibrate_operands(named, images))
    assert torch.equal(on.logits(images, 12), prepared(images)), "in full precision they are floats"
    on.choose(uniform(named.layers, 4))
    assert torch.equal(on.logits(images, 12), plain) is not bool(named.operands)


def test_what_is_multiplied_are_the_integers_of_the_usual_ranges() -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 4, 8)
    named = attending(prepare(Plain().eval(), images[:2]))
    assert named.operands == tuple(f"qkv.product{place}.{side}" for place in ("", ":1") for side in ("left", "right"))
    found = calibrate_operands(named, images)
    network = QuantizedNetwork(named, calibrate(named, images), operands=found)
    network.choose(uniform(named.layers, 8))

    def product(x: Tensor) -> list[Tensor]:
        """Queries, keys, probabilities and values in floats."""
        q, k, v = x.chunk(3, -1)
        probabilities = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(8), -1)
        return [q, k.transpose(1, 2), probabilities, v]

    tokens = images.flatten(1).unflatten(1, (-1, 8))
    with torch.no_grad():
        floats = product(named.modules[0](tokens))
        for ends, values in zip(found, floats, strict=True):
            assert ends == pytest.approx((float(values.min()), float(values.max())), abs=1e-5)
        q, k, v = network.layers[0](tokens).chunk(3, -1)
        of_q, of_k, of_p, of_v = (Affine.covering(*ends, 8) for ends in found)
        scores = (of_q.centred(q).double() @ of_k.centred(k).double().transpose(1, 2)) * of_q.scale * of_k.scale
        whole = of_p.centred(torch.softmax(scores.float() / math.sqrt(8), -1)).double() @ of_v.centred(v).double()
        wanted = network.layers[1]((whole * of_p.scale * of_v.scale).float().mean(1))
    got = network.logits(images, 6)
    assert torch.allclose(got, wanted, atol=2e-2 * float(wanted.abs().max())), "but for single roundings"
    assert (got - wanted).abs().median() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.randn(5, 7)},
        {"attn_mask": torch.tensor([[False] * 7] + [[True, False, True, True, False, True, True]] * 4)},
    ],
    ids=["plain", "causal", "scaled", "bias", "mask"],
)
def test_attention_taken_apart_is_attention(given: dict[str, object]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    assert torch.allclose(attended(q, k, v, **given), F.scaled_dot_product_attention(q, k, v, **given), atol=1e-5)
    if not given:
        few = k[:, :2], v[:, :2]
        expected = F.scaled_dot_product_attention(q, *few, enable_gqa=True)
        assert torch.allclose(attended(q, *few, enable_gqa=True), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision's ViT", "torchvision's Swin", "other functions"])
def test_both_paths_agree_and_finishing_sees_the_same(name: str) -> None:
    prepared, images = made(name)
    named = attending(prepared)
    program, allocation = record(named, images), uniform(named.layers, MOST)
    network = QuantizedNetwork(named, calibrate(named, images), operands=calibrate_operands(named, images))
    network.choose(allocation)
    fast = IntegerNetwork(network, program, allocation.activations, KeptWeights(2**30))
    fast.choose(allocation)
    assert multiplied_otherwise(fast, program, network, images) is None
    bound = network.bound(program)
    assert torch.allclose(bound.run(bound.begin(images)), network.logits(images, 12), atol=1e-2)
    network.operands[0] = Affine.covering(-0.01, 0.01, 8)
    assert multiplied_otherwise(fast, program, network, images), "it has other integers there"

    weights = [
        finish(
            QuantizedNetwork(named, calibrate(named, images), operands=network.operand_ranges), recorded, images,
            uniform(named.layers, 4), [0.1] * len(named.layers), 2**29,
        )
        for recorded in (Recorder(named, images).evenly(len(images)), None)
    ]  # fmt: skip
    for one, other in zip(*weights, strict=True):
        assert (one.integers != other.integers).float().mean() < 0.05


def test_files_hold_what_was_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, unseen = torch.randn(16, 3, 16, 16), torch.randn(8, 3, 16, 16)
    network = NETWORKS["bias put together"][0]().eval()
    quantized = quantize(network, images, "4bit", "uniform", finished=False)
    off = quantize(network, images, "4bit", "uniform", finished=False, attention_activations="off")
    assert quantized.size.inputs == off.size.inputs + 4 * 5
    wanted = quantized(unseen)
    assert not torch.equal(wanted, off(unseen))

    for name in ("model.onnx", "model.pt2", "model.safetensors"):
        left = quantized.save(tmp_path / name)
        assert left.between["softmax"] == 1
        assert not {"bmm", "clone"} & left.between.keys()
    names = [each.name for each in described(tmp_path / "model.safetensors").between]
    assert [name for name in names if "product" in name] == list(quantized.network.prepared.operands)
    again = safetensors.read(tmp_path / "model.safetensors", prepare(network, images[:2], [images]))
    assert torch.equal(again.logits(unseen, 8), wanted)
    count = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert count["QuantizeLinear"] == len(quantized.layers) + 4
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert (program(unseen) - wanted).square().mean() < 0.01 * wanted.var()


class Counted(nn.Module):
    """Multiplies as many products as there are images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flatten(1))
        return torch.stack([row.view(2, 2) @ row.view(2, 2) for row in y]).flatten(1)


def test_products_that_are_others_for_another_number_of_images_stay_in_float() -> None:
    named = attending(prepare(Counted().eval(), torch.rand(2, 3, 4, 4)))
    assert named.operands == ()
    assert "stay in float32, in place of --attention-activations 8" in named.notes[-1]


def test_a_file_of_other_products_is_told_from_one_of_the_network(tmp_path: Path) -> None:
    prepared, images = made("weights of heads returned")
    named = attending(prepared)
    network = QuantizedNetwork(named, calibrate(named, images), operands=calibrate_operands(named, images))
    allocation = uniform(named.layers, 4)
    network.choose(allocation)
    safetensors.write(tmp_path / "model.safetensors", network, allocation, {})
    other, _ = made("other functions")
    with pytest.raises(ExportMistake, match="of another network: its products of two activations are others"):
        safetensors.read(tmp_path / "model.safetensors", other)
