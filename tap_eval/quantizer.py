"""Post-training quantization of a prepared network, and switching between allocations.

Weights are symmetric integers per output channel, with the scale of least squared error.
Activations are affine integers per tensor, their range from the calibration images. The
shift that quantized weights add to a channel's mean output is taken out of the bias. Every
(layer, bits) is quantized once and kept: choosing an allocation swaps tensors.

This is the simulated path: integer values held in floats, multiplied in floating point. It
defines what is right; a faster path has to agree with it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.layers import Layer, Prepared, Quantizable

VERSION = 1
"""Part of the key of every stored measurement: raise it when a change here changes results."""


LayerBits = int | tuple[int, ...]
"""Weight bits of one layer: of all of it, or one number an output channel."""


@dataclass(frozen=True)
class Allocation:
    """Bits a layer, in the order of the layers, for its weights and for its input activations."""

    weights: tuple[LayerBits, ...]
    activations: tuple[int, ...]


def quantize_weight(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers per output channel with the scale of least squared error.

    `weight` is (O, ...); returns `integers` of its shape, float32 with whole values within
    +-(2^(bits-1) - 1), and `scale` (O,), so that `weight` is near `integers * scale`. Scales
    from a grid are each improved by alternating rounding with the exact least-squares scale
    for the rounded values; the best is kept.
    """
    flat = weight.flatten(1).double()
    top = 2 ** (bits - 1) - 1
    peak = flat.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best_error = torch.full((len(flat), 1), torch.inf, dtype=torch.float64, device=flat.device)
    best_scale = peak / top
    for shrink in torch.linspace(0.3, 1.1, 33).tolist():
        scale = peak * shrink / top
        for _ in range(4):
            integers = (flat / scale).round().clamp(-top, top)
            square = integers.square().sum(1, keepdim=True)
            scale = torch.where(square > 0, (flat * integers).sum(1, keepdim=True) / square.clamp_min(1), scale)
        integers = (flat / scale).round().clamp(-top, top)
        error = (flat - integers * scale).square().sum(1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
    integers = (flat / best_scale).round().clamp(-top, top)
    return integers.float().view_as(weight), best_scale.squeeze(1).float()


@dataclass(frozen=True)
class Affine:
    """`real = scale * (integer - zero_point)` for integers in [0, 2^bits - 1]."""

    scale: float
    zero_point: int
    bits: int

    @staticmethod
    def covering(low: float, high: float, bits: int) -> Affine:
        """The range [low, high], widened to hold zero, which is exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        top = 2**bits - 1
        scale = max((high - low) / top, 1e-12)
        return Affine(scale, min(max(round(-low / scale), 0), top), bits)

    def centred(self, x: Tensor) -> Tensor:
        """`x` as whole numbers `integer - zero_point`, in float32."""
        low, high = -self.zero_point, 2**self.bits - 1 - self.zero_point
        return x.mul(1 / self.scale).round_().clamp_(low, high)


@dataclass(frozen=True)
class Observation:
    """What the calibration images showed of a layer's input."""

    low: float
    high: float
    mean_patch: Tensor
    """mean input seen by each weight of an output channel, padding included; a filter's shape, groups stacked"""
    count: int
    """positions of the output that the mean is over"""

    def __add__(self, other: Observation) -> Observation:
        """What two calls of the layer showed."""
        count = self.count + other.count
        mean_patch = (self.mean_patch * self.count + other.mean_patch * other.count) / count
        return Observation(min(self.low, other.low), max(self.high, other.high), mean_patch, count)


class QuantizedLayer(nn.Module):
    """Stands in a network for one layer; full precision until `choose` gives it bits."""

    def __init__(self, layer: Quantizable, seen: Observation) -> None:
        super().__init__()
        self.layer = layer
        self.seen = seen
        self.affine: Affine | None = None
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self._now: tuple[Tensor, Tensor | None] = (layer.weight, layer.bias)

    @property
    def weight(self) -> Tensor:
        """The full-precision weight, for code that looks at its layers' shapes."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The full-precision bias."""
        return self.layer.bias

    def choose(self, weight_bits: LayerBits | None, activation_bits: int | None) -> None:
        """Sets the bits; `None` leaves the weights, or the input activations, in full precision."""
        self.affine = (activation_bits and Affine.covering(self.seen.low, self.seen.high, activation_bits)) or None
        if weight_bits is None:
            weight, bias = self.layer.weight, self.layer.bias
        elif isinstance(weight_bits, int):
            weight, bias = self.quantized(weight_bits)
        else:
            weight, bias = self._mixed(weight_bits)
        self._now = (weight * self.affine.scale if self.affine else weight, bias)

    def quantized(self, bits: int) -> tuple[Tensor, Tensor]:
        """The weight after quantization, and the bias that makes up for the mean it shifts."""
        if bits not in self._weights:
            integers, scale = quantize_weight(self.layer.weight, bits)
            weight = integers * scale.view(-1, *[1] * (integers.dim() - 1))
            shift = output_mean(weight - self.layer.weight, self.seen.mean_patch)
            bias = -shift if self.layer.bias is None else self.layer.bias - shift
            self._weights[bits] = (weight, bias)
        return self._weights[bits]

    def _mixed(self, bits: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Each output channel from the tensors of its own bits; channels are quantized apart from each other."""
        chosen = torch.tensor(bits, device=self.layer.weight.device)
        weight, bias = (tensor.clone() for tensor in self.quantized(bits[0]))
        for other in set(bits) - {bits[0]}:
            rows = chosen == other
            weight[rows], bias[rows] = (tensor[rows] for tensor in self.quantized(other))
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._now
        if self.affine is not None:
            x = self.affine.centred(x)
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, bias)
        return F.linear(x, weight, bias)


def output_mean(weight: Tensor, mean_patch: Tensor) -> Tensor:
    """Mean output (O,) of a layer with `weight`, without bias, on inputs whose mean patch is given."""
    groups = len(mean_patch) // weight.shape[1]
    patches = mean_patch.view(groups, 1, -1)
    return (weight.view(groups, weight.shape[0] // groups, -1) * patches).sum(-1).flatten()


def observe(layer: Quantizable, x: Tensor) -> Observation:
    """The range and mean patch of `x`, a layer's input on all calibration images."""
    low, high = (float(value) for value in torch.aminmax(x))
    if isinstance(layer, nn.Linear):
        return Observation(low, high, x.flatten(0, -2).mean(0), x.numel() // layer.in_features)
    (rows, cols), (down, right) = layer.kernel_size, layer.stride
    height, width = layer._conv_forward(x[:1], layer.weight, layer.bias).shape[-2:]
    padded = F.pad(x, layer._reversed_padding_repeated_twice)
    taps = [
        padded[:, :, row * layer.dilation[0] :: down, col * layer.dilation[1] :: right][..., :height, :width]
        for row in range(rows)
        for col in range(cols)
    ]
    means = torch.stack([tap.mean(dim=(0, 2, 3)) for tap in taps], dim=1)
    return Observation(low, high, means.view(-1, rows, cols), len(x) * height * width)


@torch.no_grad()
def calibrate(prepared: Prepared, pixels: Tensor) -> list[Observation]:
    """What each layer's input is on the calibration images, in all calls of it, in the order of the layers."""
    seen: dict[str, Observation] = {}

    def watch(layer: Layer) -> torch.utils.hooks.RemovableHandle:
        def see(module: Quantizable, args: tuple[Tensor, ...]) -> None:
            found = observe(module, args[0])
            seen[layer.name] = seen[layer.name] + found if layer.name in seen else found

        return prepared.module(layer).register_forward_pre_hook(see)

    handles = [watch(layer) for layer in prepared.layers]
    prepared.network(pixels)
    for handle in handles:
        handle.remove()
    return [seen[layer.name] for layer in prepared.layers]


class QuantizedNetwork:
    """A network whose layers can be given any bits, again and again."""

    def __init__(self, prepared: Prepared, seen: Sequence[Observation]) -> None:
        self.network = copy.deepcopy(prepared.network)
        self.layers: list[QuantizedLayer] = []
        stands_for: dict[nn.Module, QuantizedLayer] = {}
        for layer, observation in zip(prepared.layers, seen, strict=True):
            module = self.network.get_submodule(layer.name)
            assert isinstance(module, Quantizable)
            stands_for[module] = QuantizedLayer(module, observation)
            self.layers.append(stands_for[module])
        for path, module in list(self.network.named_modules(remove_duplicate=False)):
            if module in stands_for:  # under every name that it has
                parent, _, name = path.rpartition(".")
                setattr(self.network.get_submodule(parent), name, stands_for[module])

    def choose(self, allocation: Allocation | None) -> None:
        """Gives every layer its bits; `None` is full precision."""
        for index, layer in enumerate(self.layers):
            if allocation is None:
                layer.choose(None, None)
            else:
                layer.choose(allocation.weights[index], allocation.activations[index])

    @torch.inference_mode()
    def logits(self, pixels: Tensor, batch: int) -> Tensor:
        """(N, C, H, W) float32 to (N, classes), in batches of `batch`."""
        return torch.cat([self.network(part) for part in pixels.split(batch)])
