"""The layers of a network that carry bits, and the network made ready for quantizing them.

`prepare` rewrites a network so that every product of weights and activations is a call of a
`Conv2d` or `Linear` module, folds BatchNorm into the convolution before it, and describes
each layer. It works by running the network once and watching, not by tracing its source, so
any module that runs can be prepared.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from tap_eval.mistake import NetworkMistake
from tap_eval.networks.attention import separate_projections

Quantizable = nn.Conv2d | nn.Linear
_BATCH_BYTES, _LEAST_BATCH, _MOST_BATCH = 2**22, 4, 64


@dataclass(frozen=True)
class Layer:
    """A quantizable layer. Sizes are pixels, `tokens` is the length of a sequence, else 1."""

    name: str
    kind: str
    """conv, depthwise, linear or attention"""
    block: str
    """the module that holds it, "" for the network itself"""
    index: int
    depth: float
    """position in (0, 1]"""
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    groups: int
    input_size: int
    output_size: int
    tokens: int
    params: int
    """weight elements, without the bias"""
    macs: int
    """multiply-accumulates an image"""
    first: bool
    last: bool


@dataclass(frozen=True)
class Prepared:
    """A network with BatchNorm folded in, and its layers in the order in which they run."""

    network: nn.Module
    layers: tuple[Layer, ...]

    @property
    def batch(self) -> int:
        """Images a batch that run fast: so many that the largest activation stays near a core."""
        largest = max(layer.in_channels * layer.input_size**2 * layer.tokens for layer in self.layers)
        return min(max(_BATCH_BYTES // (4 * largest), _LEAST_BATCH), _MOST_BATCH)

    def module(self, layer: Layer) -> Quantizable:
        """The `Conv2d` or `Linear` that `layer` describes."""
        module = self.network.get_submodule(layer.name)
        assert isinstance(module, nn.Conv2d | nn.Linear)
        return module


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


@torch.no_grad()
def prepare(network: nn.Module, example: Tensor) -> Prepared:
    """A copy of `network` in eval mode, BatchNorm folded, with its layers.

    `example` is a batch of images, (N, C, H, W) float32, used to see which layers run and on
    what. Raises `NetworkMistake` when the network does not accept it or has no layer.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    separate_projections(network)
    _make_plain(network, example)
    _fold_batchnorm(network, example)
    calls = [call for call in _watch(network, example) if isinstance(call.module, Quantizable)]
    first_calls: dict[str, _Call] = {}
    for call in calls:
        first_calls.setdefault(call.name, call)
    if not first_calls:
        raise NetworkMistake(
            f"{type(network).__name__} ran no Conv2d and no Linear layer: give a network with at least one."
        )
    layers = tuple(
        _describe([call for call in calls if call.name == name], index, len(first_calls), len(example))
        for index, name in enumerate(first_calls)
    )
    return Prepared(network, layers)


def _watch(network: nn.Module, example: Tensor) -> list[_Call]:
    """The calls of layers and norms in one forward pass, in order."""
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: calls.append(_Call(name, module, args[0], output))
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    ]
    try:
        network(example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NetworkMistake(
            f"{type(network).__name__} does not run on images of shape {tuple(example.shape)} ({error}); "
            "give images of its size with --transform."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OWN_FORWARDS = (nn.Conv2d.forward, nn.Linear.forward)


class _Products(TorchFunctionMode):
    """Keeps the arguments of every convolution and linear product that runs under it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv2d, F.linear):
            self.found.append(dict(zip(_CONV2D, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


def _make_plain(network: nn.Module, example: Tensor) -> None:
    """Replaces layers with a forward of their own by what they were seen to do: padding, then a plain layer.

    Such are convolutions that pad like TensorFlow, or that standardize their weights. Raises
    `NetworkMistake` for one that does anything else.
    """
    for call in _watch(network, example):
        module = call.module
        if not isinstance(module, Quantizable) or type(module).forward in _OWN_FORWARDS:
            continue
        with _Products() as products:
            expected = module(call.input)
        plain = _plain(module, call.input, products.found)
        if plain is None or not torch.allclose(plain(call.input), expected, rtol=1e-4, atol=1e-5):
            raise NetworkMistake(
                f"{call.name} is a {type(module).__name__} with a forward of its own that is no padding and one "
                "product: build it from nn.Conv2d or nn.Linear."
            )
        for path, other in list(network.named_modules(remove_duplicate=False)):
            if other is module:
                _replace(network, path, plain)


def _plain(module: Quantizable, x: Tensor, products: Sequence[dict[str, Any]]) -> nn.Module | None:
    if len(products) != 1:
        return None
    product = products[0]
    if isinstance(module, nn.Linear):
        plain: Any = nn.Linear(module.in_features, module.out_features)
    else:
        settings = {name: product[name] for name in _CONV2D[3:] if name in product}
        rows, columns = module.kernel_size
        plain = nn.Conv2d(module.in_channels, module.out_channels, (rows, columns), **settings)
    bias = product.get("bias")
    plain.weight = nn.Parameter(product["weight"].clone(), requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
    padded = product["input"]
    if padded.shape == x.shape:
        return plain.eval()
    down, right = (more - less for more, less in zip(padded.shape[-2:], x.shape[-2:], strict=True))
    for top in range(down + 1):
        for left in range(right + 1):
            padding = nn.ZeroPad2d((left, right - left, top, down - top))
            if torch.equal(padding(x), padded):
                return nn.Sequential(OrderedDict(padding=padding, layer=plain)).eval()
    return None


def _fold_batchnorm(network: nn.Module, example: Tensor) -> None:
    """Folds each BatchNorm whose input is the output of one convolution and of no other use.

    That nothing else reads the convolution's output is checked by comparing the network's
    output before and after; a fold that changes it is taken back.
    """
    calls = _watch(network, example)
    ran = [call.name for call in calls]
    expected = network(example)
    for norm in calls:
        conv = next((call for call in calls if call.output is norm.input), None)
        if conv is None or not isinstance(norm.module, nn.BatchNorm2d) or not isinstance(conv.module, nn.Conv2d):
            continue
        if ran.count(norm.name) > 1 or ran.count(conv.name) > 1:
            continue
        bn, old = norm.module, (conv.module.weight, conv.module.bias)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        conv.module.weight, conv.module.bias = fuse_conv_bn_weights(
            *old, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )
        _replace(network, norm.name, nn.Identity())
        got = network(example)
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            conv.module.weight, conv.module.bias = old
            _replace(network, norm.name, bn)


def replace_layers(network: nn.Module, layers: Sequence[Layer], make: Callable[[int, Quantizable], nn.Module]) -> None:
    """Puts `make(index, module)` in the place of each layer, under every name that it has."""
    made: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        module = network.get_submodule(layer.name)
        assert isinstance(module, Quantizable)
        made[module] = make(layer.index, module)
    for path, module in list(network.named_modules(remove_duplicate=False)):
        if module in made:
            parent, _, name = path.rpartition(".")
            setattr(network.get_submodule(parent), name, made[module])


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _describe(calls: Sequence[_Call], index: int, count: int, batch: int) -> Layer:
    """The layer of these calls, in one pass over `batch` images; sizes are those of the first."""
    call = calls[0]
    module, x, y = call.module, call.input, call.output
    shared: dict[str, Any] = {
        "name": call.name,
        "block": call.name.rpartition(".")[0],
        "index": index,
        "depth": (index + 1) / count,
        "first": index == 0,
        "last": index == count - 1,
    }
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups > 1 and module.groups == module.in_channels
        return Layer(
            **shared,
            kind="depthwise" if depthwise else "conv",
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel=module.kernel_size[0],
            stride=module.stride[0],
            groups=module.groups,
            input_size=x.shape[-1],
            output_size=y.shape[-1],
            tokens=1,
            params=module.weight.numel(),
            macs=sum(module.weight.numel() * each.output.shape[-2] * each.output.shape[-1] for each in calls),
        )
    assert isinstance(module, nn.Linear)
    tokens = [
        each.input.numel() // module.in_features // (1 if len(each.input) % batch else batch) for each in calls
    ]  # some read a table that is the same for all images
    attention = "attn" in call.name or "attention" in call.name
    return Layer(
        **shared,
        kind="attention" if attention else "linear",
        in_channels=module.in_features,
        out_channels=module.out_features,
        kernel=1,
        stride=1,
        groups=1,
        input_size=1,
        output_size=1,
        tokens=tokens[0],
        params=module.weight.numel(),
        macs=module.weight.numel() * sum(tokens),
    )
