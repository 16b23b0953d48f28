"""Networks that write products in every way, and what holds of each once it is prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork


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
    "normalized": (lambda: Held((8, 8), lambda x, kernel: F.linear(x, F.normalize(kernel))), ["kernel"]),
    "einsum with ellipsis": (lambda: Held((8, 8), lambda x, k: torch.einsum("...c,oc->...o", x, k)), ["kernel"]),
    "einsum without output": (lambda: Held((8, 8), lambda x, k: torch.einsum("btc,cz", x, k)), ["kernel"]),
    "einsum of heads": (
        lambda: Held((8, 2, 4), lambda x, k: torch.einsum("...c,chd->...hd", x, k).flatten(-2)),
        ["kernel"],
    ),
    "matrix by keyword": (
        lambda: Held((8, 8), lambda x, kernel: torch.mm(x.flatten(0, 1), mat2=kernel).view_as(x)),
        ["kernel"],
    ),
    "vectors": (
        lambda: Held((8, 8), lambda x, k: torch.stack([y @ k for y in x.flatten(0, 1)]).view_as(x)),
        ["kernel"],
    ),
    "vectors from the right": (
        lambda: Held((8, 8), lambda x, k: torch.stack([k.mv(y) + k @ y for y in x.flatten(0, 1)]).view_as(x)),
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


class NormAct(nn.BatchNorm2d):
    """Batch normalization that does the activation too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))
