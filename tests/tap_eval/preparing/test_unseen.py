"""Weights that code reads out of sight or changes on the way, and networks that hold on to themselves."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.mistake import NetworkMistake, WeightsMistake
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.unseen import UNSEEN
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork
from tests.tap_eval.preparing.networks import assert_all_run_quantized, checked

GLOBAL = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))


class Code(nn.Module):
    """What `setup` has made of it and `forward` computes with it."""

    def __init__(self, setup: Callable[[Any], object], forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.code = forward
        self.head = nn.Linear(8, 3)
        setup(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.code(self, x).flatten(2).mean(2))


def conv(self: Any) -> None:
    self.conv = nn.Conv2d(3, 8, 3)


def two_in_a_list(self: Any) -> None:
    self.convs = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)]


def normed_in_a_list(self: Any) -> None:
    self.blocks = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()]


def cached(self: Any) -> None:
    self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
    self.twice = functools.cache(lambda: self.kernel * 2)


@pytest.mark.parametrize(
    ("setup", "forward", "layers"),
    [
        (two_in_a_list, lambda self, x: self.convs[1](self.convs[0](x)), 2),
        (lambda self: None, lambda self, x: F.conv2d(x, GLOBAL), 1),
        (cached, lambda self, x: F.conv2d(x, self.twice()), 1),
        (normed_in_a_list, lambda self, x: self.blocks[0](x), 1),
    ],
    ids=["modules in a plain list", "global", "cache", "batch normalization in a plain list"],
)
def test_weights_that_no_module_holds_are_layers_and_a_note_says_so(
    setup: Callable[[Any], object], forward: Callable[[Any, Tensor], Tensor], layers: int
) -> None:
    torch.manual_seed(0)
    prepared = checked(Code(setup, forward))
    assert [layer.name.partition(".")[0] for layer in prepared.layers] == ["outside"] * layers + ["head"]
    assert any("none of its modules holds" in note and "8 x 3 x 3 x 3" in note for note in prepared.notes)
    assert prepared.left == 0
    assert_all_run_quantized(prepared)


@torch.jit.script
def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return torch.relu(torch.nn.functional.conv2d(x, weight))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.conv2d(x, torch.from_numpy(self.conv.weight.numpy() * 2)),
        lambda self, x: scripted(x, self.conv.weight),
        lambda self, x: torch.vmap(lambda weight: F.conv2d(x, weight[None])[:, 0], out_dims=1)(self.conv.weight),
    ],
    ids=["NumPy", "scripted function", "vmap"],
)
def test_what_is_read_out_of_sight_stays_in_float_and_is_accounted_for(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    rest = {each.name: each for each in checked(Code(conv, forward)).rest}
    assert (rest["conv.weight"].reason, rest["conv.weight"].count) == (UNSEEN, 216)
    assert rest["conv.bias"].reason == ""


def in_between(self: Any, x: Tensor) -> Tensor:
    weight = self.conv.weight.clone()
    first, view = F.conv2d(x, weight), weight[0]
    view.zero_()
    second = F.conv2d(x, weight)
    weight[1:] *= 2
    return first + second.relu() + F.conv2d(x, weight)


def by_the_image(self: Any, x: Tensor) -> Tensor:
    weight = self.conv.weight.clone()
    weight.view(-1).mul_(1 + x.mean())
    return F.conv2d(x, weight)


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (in_between, ["conv", "conv[1]", "conv[2]", "head"]),
        (by_the_image, ["head"]),
        (
            lambda self, x: (
                F.conv2d(x, self.conv.weight[: np.int64(4)])
                * F.conv2d(x, self.conv.weight[np.int64(4) :]).repeat(1, 2, 1, 1)[:, :1]
            ),
            ["conv", "conv[1]", "head"],
        ),
    ],
    ids=["written in between", "written by the image", "NumPy's numbers"],
)
def test_weights_are_what_they_are_when_they_are_multiplied(
    forward: Callable[[Any, Tensor], Tensor], names: list[str]
) -> None:
    torch.manual_seed(0)
    network = Code(conv, forward)
    network.head = nn.Linear(4 if len(names) == 3 else 8, 3)
    prepared = checked(network)
    assert [layer.name for layer in prepared.layers] == names
    with torch.inference_mode():
        x = torch.randn(3, 3, 16, 16)
        assert torch.allclose(prepared(x), network(x), atol=1e-5)


def features(self: Any) -> None:
    conv(self)
    self.seen = {}
    self.conv.register_forward_hook(lambda module, args, output: self.seen.update(conv=output))
    self(torch.rand(2, 3, 16, 16))


def patched(self: Any) -> None:
    conv(self)
    self.drop, original = nn.Dropout(), self.conv.forward
    self.conv.forward = lambda x: self.drop(original(x)) * 2


@pytest.mark.parametrize(
    ("setup", "forward"),
    [
        (features, lambda self, x: (self.conv(x), self.seen["conv"])[1]),
        (patched, lambda self, x: self.conv(x)),
    ],
    ids=["features kept by a hook", "patched method"],
)
def test_functions_that_refer_to_the_network_refer_to_the_copy(
    setup: Callable[[Any], object], forward: Callable[[Any, Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    network = Code(setup, forward)
    prepared = prepare(network.train(), torch.rand(2, 3, 16, 16))
    assert network.training
    x, network = torch.rand(5, 3, 16, 16), network.eval()
    with torch.no_grad():
        expected = network(x)
        network.conv.weight.zero_()
        assert torch.allclose(prepared(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("setup", "forward", "layers"),
    [
        (conv, lambda self, x: self.conv.double()(x.double()).float(), 2),
        (conv, lambda self, x: F.conv2d(x.double(), self.conv.weight.double()).float(), 2),
        (
            lambda self: setattr(self, "kernel", nn.Parameter(torch.randn(8, 3, dtype=torch.complex64))),
            lambda self, x: (x.flatten(2).mT.to(torch.complex64) @ self.kernel.T).real.mT,
            1,
        ),
        (conv, torch.compile(lambda self, x: self.conv(x).relu(), backend="eager"), 2),
    ],
    ids=["double", "made double", "complex", "compiled function"],
)
def test_other_numbers_and_compiled_functions_run(
    setup: Callable[[Any], object], forward: Callable[[Any, Tensor], Tensor], layers: int
) -> None:
    torch.manual_seed(0)
    prepared = checked(Code(setup, forward))
    assert len(prepared.layers) == layers
    assert prepared.left == (2 * 8 * 3 if layers == 1 else 0)
    assert_all_run_quantized(prepared)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inside_becomes_float32(autocast: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return self.conv(x).float() if autocast else F.conv2d(x.bfloat16(), self.conv.weight.bfloat16()).float()

    torch.manual_seed(0)
    network = Code(conv, forward).eval()
    prepared = prepare(network, torch.rand(2, 3, 16, 16))
    assert any("half precision" in note for note in prepared.notes)
    x = torch.rand(4, 3, 16, 16)
    plain = F.conv2d(x, network.conv.weight, network.conv.bias if autocast else None)
    with torch.no_grad():
        assert torch.allclose(prepared(x), network.head(plain.mean((2, 3))), atol=1e-6 if autocast else 1e-3)


@pytest.mark.parametrize("shape", [(1,), (1, 8), (196, 8)])
def test_a_bias_of_any_shape_is_added(shape: tuple[int, ...]) -> None:
    def setup(self: Any) -> None:
        self.weight, self.add = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(shape))

    torch.manual_seed(0)
    prepared = checked(Code(setup, lambda self, x: F.linear(x.flatten(2).mT, self.weight, self.add).mT), 14)
    assert {rest.name: rest.reason for rest in prepared.rest} == {"add": "linear"}
    assert_all_run_quantized(prepared, 14)


def test_a_weight_that_is_multiplied_in_two_ways_is_said_to_count_twice() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3), keepdim=True) + F.conv2d(x, self.conv.weight, stride=2)

    torch.manual_seed(0)
    prepared = checked(Code(conv, forward))
    assert sum(layer.params for layer in prepared.layers) == 2 * 216 + 24
    assert prepared.notes == (
        "conv.weight is multiplied in 2 ways, as conv, conv[1]: each has bits of its own, and counts",
    )


def test_experts_that_no_image_of_a_batch_reaches_are_calibrated_on_others() -> None:
    def setup(self: Any) -> None:
        self.dark, self.bright = nn.Linear(3, 8), nn.Linear(3, 8)

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.mean((2, 3))
        result, bright = torch.zeros(len(x), 8), x.mean(1) > 0.25
        for chosen, expert in ((bright, self.bright), (~bright, self.dark)):
            result[chosen] = expert(x[chosen])
        return result[..., None]

    torch.manual_seed(0)
    bright, network = torch.rand(2, 3, 16, 16), Code(setup, forward).eval()
    prepared = prepare(network, bright, [torch.cat([bright, 0.1 * bright])])
    assert [layer.name for layer in prepared.layers] == ["bright", "head", "dark"]
    x = torch.cat([0.1 * bright, bright])
    assert calibrate(prepared, bright)[2].high == calibrate(prepared, x)[2].high
    quantized = QuantizedNetwork(prepared, calibrate(prepared, x))
    quantized.choose(Allocation((8,) * 3, (8,) * 3))
    assert torch.allclose(quantized.logits(x, 4), network(x), atol=0.02)


@torch.library.custom_op("tests::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Not what PyTorch calls so."""
    return torch.exp(x) @ weight


def test_operators_of_others_are_not_taken_for_those_of_the_same_name() -> None:
    def setup(self: Any) -> None:
        self.weight = nn.Parameter(torch.randn(3, 8))

    torch.manual_seed(0)
    prepared = checked(Code(setup, lambda self, x: torch.ops.tests.linear(x.flatten(2).mT, self.weight).mT))
    assert {rest.name: rest.reason for rest in prepared.rest} == {"weight": "tests.linear"}


def trained_on(self: Any) -> None:
    conv(self)
    self.norms = [nn.BatchNorm2d(8)]


@pytest.mark.parametrize(
    ("make", "mistake", "words"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3), nn.Flatten()), WeightsMistake, "0.weight of .* that ran once"),
        (lambda: nn.Linear(3, 3, device="meta"), WeightsMistake, "weight of Linear has no values yet"),
        (
            lambda: Code(
                lambda self: setattr(self, "packed", torch.ao.nn.quantized.dynamic.Linear(3, 8)),
                lambda self, x: self.packed(x.flatten(2).mT).mT,
            ),
            NetworkMistake,
            "quantized and packed already",
        ),
        (lambda: Code(trained_on, lambda self, x: self.norms[0](self.conv(x))), NetworkMistake, "stays in training"),
        (
            lambda: Code(lambda self: setattr(self, "lock", threading.Lock()), lambda self, x: x),
            NetworkMistake,
            "cannot be copied by copy.deepcopy",
        ),
    ],
    ids=["lazy", "meta", "packed", "training", "no copy"],
)
@pytest.mark.filterwarnings("ignore:.*(deprecated|Lazy modules).*")
def test_what_cannot_be_watched_or_copied_is_said(
    make: Callable[[], nn.Module], mistake: type[Exception], words: str
) -> None:
    with pytest.raises(mistake, match=words):
        prepare(make(), torch.rand(2, 3, 8, 8))
