"""What is prepared is the user's network: what was put on it stays, every tensor is accounted for, faults are said."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from tap_eval.mistake import NetworkMistake, WeightsMistake
from tap_eval.preparing.prepare import prepare
from tests.tap_eval.preparing.networks import Net, assert_all_run_quantized, checked, randomized


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        weight_norm,
        spectral_norm,
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: (conv := weight_norm(conv), conv(torch.rand(1, 3, 8, 8)))[0],
        lambda conv: (conv.register_forward_hook(lambda module, args, output: 3 * output), conv)[1],
        lambda conv: (conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,)), conv)[1],
    ],
    ids=[
        "weight_norm",
        "spectral_norm",
        "orthogonal",
        "old weight_norm",
        "old spectral_norm",
        "pruned",
        "old weight_norm after a pass",
        "forward hook",
        "pre-hook",
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_a_user_put_on_a_layer_stays(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    prepared = checked(Net(nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)), 8))
    assert [layer.name for layer in prepared.layers] == ["body.0", "head"]
    assert prepared.layers[0].params == 3 * 8 * 9
    assert_all_run_quantized(prepared)


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = randomized(Net(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 8)).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16()).float()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(nn.Conv2d(3, 8, 3), 8).half(),
        lambda: Net(nn.Conv2d(3, 8, 3), 8).bfloat16(),
        Cast,
        lambda: torch.compile(Net(nn.Conv2d(3, 8, 3), 8), backend="eager"),
        lambda: nn.DataParallel(Net(nn.Conv2d(3, 8, 3), 8)),
        lambda: torch.jit.script(randomized(Net(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 8))),
        lambda: torch.jit.trace(Net(nn.Conv2d(3, 8, 3), 8).eval(), torch.rand(2, 3, 8, 8)),
    ],
    ids=["float16", "bfloat16", "casts inside", "compiled", "data parallel", "scripted", "traced"],
)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning")
def test_wrapped_networks_and_half_precision_run_in_float32(make: Callable[[], nn.Module]) -> None:
    prepared = prepare(make().eval(), torch.rand(2, 3, 8, 8))
    assert prepared(torch.rand(4, 3, 8, 8)).dtype == torch.float32
    assert [layer.name.rpartition(".")[2] for layer in prepared.layers][-1] == "head"
    assert_all_run_quantized(prepared, 8)


def test_branches_are_fused_as_they_are_deployed() -> None:
    class Branched(nn.Module):
        """Two convolutions in training, one in deployment."""

        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)

        def fuse(self) -> nn.Module:
            self.wide.weight.data[:, :, 1:2, 1:2] += self.narrow.weight
            self.wide.bias.data += self.narrow.bias  # type: ignore[union-attr]
            return self.wide

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.narrow(x)

    torch.manual_seed(0)
    prepared = checked(Net(Branched(), 8))
    assert [(layer.name, layer.kernel) for layer in prepared.layers] == [("body", 3), ("head", 1)]
    assert prepared.notes == ("its branches are fused by its own methods, as it is deployed",)
    half = prepare(Net(Branched(), 8).half(), torch.rand(2, 3, 8, 8))
    assert [layer.name for layer in half.layers] == ["body", "head"]


def test_a_network_whose_own_fuse_is_something_else_is_measured_as_it_is() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def fuse(self, *features: Tensor) -> Tensor:
            return torch.stack(features).sum(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.fuse(self.conv(x), self.conv(x.flip(3)))

    prepared = checked(Net(Pyramid(), 8))
    assert [layer.name for layer in prepared.layers] == ["body.conv", "head"]
    assert prepared.notes[0].startswith("it is measured as it is, though Net has branches to be fused, but that fails")


def test_every_tensor_is_accounted_for_once() -> None:
    class Rests(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.cube = nn.Conv3d(1, 2, 3)
            self.rows = nn.LSTM(8, 4, batch_first=True, bias=False)
            self.table = nn.Embedding(5, 8)
            self.heads = nn.Parameter(torch.randn(2, 4, 4))
            self.tied = self.conv
            self.auxiliary = nn.Linear(8, 3)
            self.body_norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x)) + self.tied(x)
            rows = y.flatten(2).transpose(1, 2)
            rows = self.body_norm(rows) + self.table((x.mean((1, 2, 3)) > 0).long())[:, None]
            rows = self.rows(rows)[0].mean(1)[:, None] @ self.heads.mean(0)[:, :4]
            return torch.cat([rows[:, 0], self.cube(x[:, None]).mean((2, 3, 4))], 1)

    network = Rests()
    prepared = prepare(randomized(network), torch.rand(2, 3, 8, 8))
    rest = {each.name: (each.reason, each.count) for each in prepared.rest}
    assert [layer.name for layer in prepared.layers] == ["conv", "heads"]
    assert rest["cube.weight"] == ("conv3d", 54)
    assert rest["rows.weight_ih_l0"] == ("lstm", 128)
    assert rest["table.weight"] == ("embedding", 40)
    assert rest["auxiliary.weight"] == ("", 24)
    assert rest["norm.running_mean"] == ("batch_norm", 8)
    assert rest["body_norm.bias"] == ("layer_norm", 8)
    held = {name for name, _ in network.named_parameters()} - rest.keys()
    assert held == {"conv.weight", "conv.bias", "heads"}
    left = sum(count for reason, count in rest.values() if reason)
    assert prepared.left == left
    layers = sum(layer.params for layer in prepared.layers)
    assert prepared.share_left == pytest.approx(left / (left + layers))


def test_what_a_module_computes_once_and_keeps_is_its_parameter() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(8, 8), nn.Parameter(torch.rand(4, 8))
            self.again = self.table
            self.register_buffer("places", torch.rand(16), persistent=False)
            self.cache: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if "table" not in self.cache:
                self.cache["table"] = self.table.repeat(4, 1)
            return self.linear(x) + self.cache["table"] + self.places[:, None]

    prepared = checked(Net(Kept(), 8, tokens=True))
    assert [(rest.name, rest.reason, rest.count) for rest in prepared.rest] == [("body.table", "add", 32)]


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) + torch.rand(3)


@pytest.mark.parametrize(
    ("network", "size", "words"),
    [
        (lambda: nn.Flatten(), 4, "no convolution and in no linear layer"),
        (
            lambda: nn.Sequential(nn.Conv2d(5, 3, 3), nn.AdaptiveAvgPool2d(1)),
            8,
            r"does not run on images of shape \(2, 3, 8, 8\).*--transform",
        ),
        (
            lambda: Net(nn.Conv2d(1, 8, 3), 8),
            8,
            "takes images of 1 channel, and these have 3: .*--transform channels=1",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3), Random()), 8, "other outputs in a second pass"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.AdaptiveAvgPool2d(1)
            ),
            8,
            "batch normalization 1 has no running statistics",
        ),
    ],
    ids=["no layer", "other channels", "grey", "random", "statistics of the batch"],
)
def test_what_cannot_be_prepared_is_said(network: Callable[[], nn.Module], size: int, words: str) -> None:
    with pytest.raises(NetworkMistake, match=words):
        prepare(network(), torch.rand(2, 3, size, size))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    network = Net(nn.Conv2d(3, 8, 3), 8)
    network.body.weight.data[0, 0, 0, 0] = value
    with pytest.raises(WeightsMistake, match=r"body.weight of Net has 1 of 216 values that are NaN"):
        prepare(network, torch.rand(2, 3, 8, 8))
