"""What is prepared is the user's network: the same outputs, every product a layer, every tensor accounted for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision import models

from tap_eval.mistake import NetworkMistake, WeightsMistake
from tap_eval.networks.resnet import CifarResNet
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork, calibrate


def randomized(network: nn.Module) -> nn.Module:
    """With statistics in batch normalization that are not the initial ones."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


class Net(nn.Module):
    """`body`, which gives (N, C, ...) or, for tokens, (N, T, C), and a linear layer."""

    def __init__(self, body: nn.Module, width: int, tokens: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Conv2d(3, width, 4, 4) if tokens else None
        self.body, self.head = body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is not None:
            return self.head(self.body(self.tokens(x).flatten(2).transpose(1, 2)).mean(1))
        return self.head(self.body(x).flatten(2).mean(2))


def checked(network: nn.Module, size: int = 16) -> Prepared:
    """`network` prepared, whose outputs are the network's on images that it has not seen, in two batches."""
    torch.manual_seed(1)
    prepared = prepare(randomized(network), torch.rand(2, 3, size, size))
    for count in (1, 5):
        x = torch.randn(count, 3, size, size)
        with torch.no_grad():
            got, expected = prepared(x), network(x)
        assert torch.allclose(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-7)
    return prepared


def assert_all_run_quantized(prepared: Prepared, size: int = 16) -> None:
    """Each listed layer is called when the network runs with other layers in their places."""
    x = torch.rand(4, 3, size, size)
    network = QuantizedNetwork(prepared, calibrate(prepared, x))
    count = len(prepared.layers)
    network.choose(Allocation((2,) * count, (8,) * count))
    ran: set[int] = set()

    def watched(index: int) -> Callable[[Tensor], Tensor]:
        def call(given: Tensor) -> Tensor:
            ran.add(index)
            return network.layers[index](given)

        return call

    prepared(x, [watched(index) for index in range(count)])
    assert ran == set(range(count))


@pytest.mark.parametrize(
    ("network", "size", "layers", "folded"),
    [
        (CifarResNet(20), 32, 20, 19),
        (models.resnet18(num_classes=10), 64, 21, 20),
        (models.mobilenet_v2(num_classes=10), 64, 53, 52),
        (models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), 32, 10, 0),
        (models.swin_t(num_classes=10), 64, 53, 0),
        (models.swin_v2_t(num_classes=10), 64, 53, 0),
    ],
    ids=["resnet20", "resnet18", "mobilenet_v2", "vit", "swin_t", "swin_v2_t"],
)
def test_networks_of_every_family_are_prepared(network: nn.Module, size: int, layers: int, folded: int) -> None:
    prepared = checked(network, size)
    names = [layer.name for layer in prepared.layers]
    assert len(names) == len(set(names)) == layers
    assert set(names) <= {name for name, _ in network.named_modules()} | {
        name.removesuffix("_weight") for name, _ in network.named_parameters()
    }
    assert [layer.index for layer in prepared.layers] == list(range(layers))
    assert len(prepared.folded) == folded


def test_resnet20_has_the_published_counts() -> None:
    layers = prepare(CifarResNet(20), torch.rand(2, 3, 32, 32)).layers
    assert sum(layer.params for layer in layers) == 268_336
    assert sum(layer.macs for layer in layers) == 40_551_040
    assert (layers[0].first, layers[-1].last, layers[-1].kind) == (True, True, "linear")


class Functional(nn.Module):
    """A product with weights that `call` computes from a module."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


class Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.act = lambda x: F.relu(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = [nn.Conv2d(3 if index == 0 else 8, 8, 3, padding=1) for index in range(2)]
        for index, conv in enumerate(self.convs):
            self.add_module(f"conv{index}", conv)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x


class SplitBias(nn.Module):
    """One projection whose bias is put together in forward, as in BEiT and EVA-02."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.q, self.v = (
            nn.Linear(8, 24, bias=False),
            nn.Parameter(torch.rand(8)),
            nn.Parameter(torch.rand(8)),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight, torch.cat([self.q, torch.zeros(8), self.v])).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Held(nn.Module):
    """A product with a Parameter of its own."""

    def __init__(self, shape: tuple[int, ...], call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel, self.call = nn.Parameter(torch.randn(*shape)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.kernel)


class PaddedLikeTensorFlow(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


def encoder(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, **options)


IMAGES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "transposed": (lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ConvTranspose2d(4, 8, 4, 2, groups=2)), ["0", "1"]),
    "transposed with all settings": (
        lambda: nn.ConvTranspose2d(3, 8, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(2, 1), bias=False),
        [""],
    ),
    "one axis": (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 9, 2, padding=2, dilation=3)), ["1"]),
    "one axis transposed": (lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(3, 8, 4, 3, 1)), ["1"]),
    "padding by name": (lambda: nn.Conv2d(3, 8, 4, padding="same", dilation=(1, 2)), [""]),
    "reflect": (lambda: nn.Conv2d(3, 8, 3, padding=2, padding_mode="reflect"), [""]),
    "circular": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), [""]),
    "padded in forward": (lambda: PaddedLikeTensorFlow(3, 8, 3, stride=2), [""]),
    "standardized": (lambda: Standardized(3, 8, 3, padding=1), [""]),
    "weight of a module": (
        lambda: Functional(nn.Conv2d(3, 8, 3), lambda conv, x: F.conv2d(x, conv.weight, conv.bias)),
        ["layer"],
    ),
    "forward called": (lambda: Functional(nn.Conv2d(3, 8, 3), lambda conv, x: conv.forward(x)), ["layer"]),
    "keyword": (lambda: Functional(nn.Conv2d(3, 8, 3), lambda conv, x: conv(input=x)), ["layer"]),
    "closure": (Closure, ["conv"]),
    "list": (Listed, ["conv0", "conv1"]),
    "one image at a time": (
        lambda: Functional(nn.Conv2d(3, 8, 3), lambda conv, x: torch.stack([conv(image) for image in x])),
        ["layer"],
    ),
    "what a layer is asked": (
        lambda: Functional(
            nn.Conv2d(3, 8, 3, 2),
            lambda conv, x: conv(F.pad(x, [conv.kernel_size[0] // conv.stride[0]] * 4)) / conv.in_channels,
        ),
        ["layer"],
    ),
}
TOKENS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "split bias": (SplitBias, ["qkv"]),
    "matmul": (lambda: Held((8, 8), lambda x, kernel: x @ kernel), ["kernel"]),
    "matmul from the left": (lambda: Held((16, 16), lambda x, kernel: kernel @ x), ["kernel"]),
    "transposed view": (lambda: Held((8, 8), lambda x, kernel: torch.matmul(x, kernel.T[:, :8])), ["kernel"]),
    "einsum": (
        lambda: Held(
            (8, 2, 4), lambda x, kernel: torch.einsum("btc,chd->bhtd", x, kernel).flatten(1, 2).repeat(1, 1, 2)
        ),
        ["kernel"],
    ),
    "bilinear": (lambda: Functional(nn.Bilinear(8, 8, 8), lambda layer, x: layer(x, x)), ["layer"]),
    "bias of the image": (
        lambda: Functional(nn.Linear(8, 8), lambda layer, x: F.linear(x, layer.weight, x.mean((0, 1)))),
        ["layer"],
    ),
    "one vector at a time": (
        lambda: Functional(nn.Linear(8, 8), lambda f, x: torch.stack([f(row) for row in x.flatten(0, 1)]).view_as(x)),
        ["layer"],
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(encoder(batch_first=True), 2),
        [f"layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")],
    ),
    "sequence first": (
        lambda: encoder(batch_first=False),
        ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"],
    ),
    "causal": (
        lambda: Functional(attention(), lambda layer, x: layer(x, x, x, need_weights=False, is_causal=False)[0]),
        ["layer.in_proj", "layer.out_proj"],
    ),
    "masked": (
        lambda: Functional(
            attention(),
            lambda layer, x: layer(x, x, x, attn_mask=torch.ones(16, 16).triu(1).bool(), need_weights=False)[0],
        ),
        ["layer.in_proj", "layer.out_proj"],
    ),
    "weights of each head": (
        lambda: Functional(attention(), lambda layer, x: layer(x, x, x, average_attn_weights=False)[0]),
        ["layer.in_proj", "layer.out_proj"],
    ),
    "pooled by attention": (
        lambda: Functional(attention(), lambda layer, x: layer(x.mean(1, keepdim=True), x, x)[0]),
        ["layer.in_proj", "layer.in_proj[1]", "layer.out_proj"],
    ),
    "other widths": (
        lambda: Functional(attention(kdim=8, vdim=4), lambda layer, x: layer(x, x, x[..., :4])[0]),
        ["layer.q_proj", "layer.k_proj", "layer.v_proj", "layer.out_proj"],
    ),
}


@pytest.mark.parametrize(("case", "tokens"), [*((case, False) for case in IMAGES), *((case, True) for case in TOKENS)])
def test_every_product_with_weights_is_a_layer_however_it_is_written(case: str, tokens: bool) -> None:
    make, names = (IMAGES | TOKENS)[case]
    torch.manual_seed(0)
    network = Net(make(), 8, tokens)
    prepared = checked(network)
    expected = [f"body.{name}".removesuffix(".") for name in names]
    assert [layer.name for layer in prepared.layers] == [*(["tokens"] if tokens else []), *expected, "head"]
    weights = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    assert sum(layer.params for layer in prepared.layers) == weights
    assert_all_run_quantized(prepared)


class NormAct(nn.BatchNorm2d):
    """Batch normalization that does the activation too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class TokensNorm(nn.Module):
    """Batch normalization of a linear layer's features, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x).relu_()


class ChannelsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


class Twice(nn.Module):
    """A convolution and its norm, both called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Shared(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), read

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.read(y)
        return self.norm(y) + z


@pytest.mark.parametrize(
    ("body", "width", "tokens", "folded"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8)), 8, False, ["body.1"]),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.BatchNorm2d(8, affine=False)),
            8,
            False,
            ["body.2"],
        ),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3, 2), nn.BatchNorm2d(8)), 8, False, ["body.1"]),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), 8, False, ["body.2"]),
        (TokensNorm, 8, True, ["body.norm"]),
        (ChannelsFirst, 8, True, ["body.norm"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), 8, False, []),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8)), 8, False, []),
        (Twice, 3, False, []),
        (lambda: Shared(lambda y: y), 8, False, []),
        (lambda: Shared(torch.relu), 8, False, []),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Unflatten(1, (4, 2)), nn.BatchNorm2d(4), nn.Flatten(1, 2)
            ),
            8,
            False,
            [],
        ),
    ],
    ids=[
        "with activation",
        "behind dropout",
        "transposed",
        "one axis",
        "tokens",
        "channels first",
        "behind an activation",
        "behind one in place",
        "called twice",
        "added to its input",
        "read by another",
        "of other channels",
    ],
)
def test_a_norm_is_folded_where_it_alone_reads_its_layer(
    body: Callable[[], nn.Module], width: int, tokens: bool, folded: list[str]
) -> None:
    torch.manual_seed(0)
    prepared = checked(Net(body(), width, tokens))
    assert list(prepared.folded.values()) == folded
    assert_all_run_quantized(prepared)


def test_a_fold_is_exact_where_images_show_little_of_it() -> None:
    class Gated(nn.Module):
        """A branch that opens for bright images."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), NormAct(8)

        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(20 * x.mean((1, 2, 3), keepdim=True) - 10)
            x = self.stem(x)
            return x + gate * self.norm(self.conv(x))

    torch.manual_seed(0)
    network = randomized(Net(Gated(), 8))
    dark, bright = torch.rand(2, 3, 16, 16) * 0.1, torch.rand(8, 3, 16, 16) + 0.5
    prepared = prepare(network, dark)
    with torch.no_grad():
        assert torch.allclose(prepared(bright), network(bright), atol=1e-5)


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


def test_a_layer_with_several_names_calls_and_sizes_is_one_layer() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
            self.again = self.shared
            self.tied = nn.Conv2d(3, 3, 3, padding=1)
            self.tied.weight = self.shared.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(F.avg_pool2d(self.other(self.shared(x)), 2))
            return self.tied(F.avg_pool2d(x, 2)).mean((2, 3))

    shared, other = prepare(Pyramid(), torch.rand(2, 3, 16, 16)).layers
    assert (shared.name, shared.first, other.last) == ("shared", True, True)
    assert shared.macs == 3 * 3 * 9 * (16 * 16 + 8 * 8 + 4 * 4)


def test_patches_folded_into_the_batch_count() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            patches = x.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
            return self.linear(self.conv(patches).mean((2, 3))).view(len(x), 16, 3).mean(1)

    conv, linear = prepare(Patches(), torch.rand(2, 3, 16, 16)).layers
    assert (conv.macs, linear.macs, linear.tokens) == (3 * 8 * 9 * 256, 8 * 3 * 16, 16)


def test_layers_that_only_some_images_reach_are_found_and_observed() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.dark, self.bright = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x)).mean((2, 3))
            return torch.stack(
                [(self.bright if image.mean() > 5 else self.dark)(row) for image, row in zip(x, y, strict=True)]
            )

    torch.manual_seed(0)
    network = randomized(Gated())
    dark, bright = torch.rand(2, 3, 8, 8), torch.rand(3, 3, 8, 8) + 10
    prepared = prepare(network, dark, [torch.cat([dark, bright])])
    assert [layer.name for layer in prepared.layers] == ["conv", "dark", "bright"]
    seen = calibrate(prepared, dark)
    assert seen[2].high > seen[1].high
    unmet = prepare(network, dark)
    with pytest.raises(NetworkMistake, match=r"reaches the weights of bright.weight.*more calibration images"):
        unmet(bright)


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


def test_a_fold_that_changes_outputs_is_taken_back_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that another step reads unseen: the check of outputs finds it, and only that norm stays apart."""

    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.first(x))
            with torch._C.DisableTorchFunction():
                more = y.mean()
            return self.norm(y) * more

    torch.manual_seed(0)
    prepared = checked(Net(Unseen(), 8))
    assert list(prepared.folded.values()) == ["body.first.1"]
    assert prepared.notes == ("body.norm stays apart: folded, it would change outputs",)
