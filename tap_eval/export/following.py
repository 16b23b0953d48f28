"""Whether a program computes from a file what its network computes, judged step by step on equal inputs.

Two correct ways to compute a network differ by single roundings, after which everything differs
a little: outputs cannot tell that from a fault. So the bytes that the program makes of a value
take the place of those of the simulated path, and have to be the nearest to what the simulated
path makes of the bytes before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from tap_eval.export.graph import bytes_name, labels_of, names_of, recorded, unpadded
from tap_eval.preparing.program import Program, Step, Value, bind
from tap_eval.quantization.agreement import NOISE, recorded_otherwise
from tap_eval.quantization.quantizer import Affine, QuantizedNetwork

Run = Callable[[Tensor], tuple[Tensor, Mapping[str, Tensor]]]
"""From images (N, C, H, W) to logits (N, classes), and to the bytes of values (N, ...) by their `bytes_name`."""


class _Otherwise(Exception):
    """Where something else is computed."""


@torch.inference_mode()
def computed_otherwise(
    run: Run, network: QuantizedNetwork, images: Tensor, biases: Mapping[str, Tensor] = MappingProxyType({})
) -> str | None:
    """Where `run` first computes something else than `network` does of images (N, C, H, W), None if nowhere.

    `biases` (O,) are by how much those of the program are known to be others, by the names of calls.
    """
    prepared = network.prepared
    program = recorded(prepared, images[:1].expand(min(prepared.batch, len(images)), -1, -1, -1))
    following = _Following(network, program, biases)
    for part in images.split(program.batch):
        padded = program.padded(part)
        if place := recorded_otherwise(prepared, program, padded):
            return f"{place}, as its steps were recorded"
        found, shown = run(padded)
        try:
            wanted = following.logits(padded, shown)
        except _Otherwise as otherwise:
            return str(otherwise)
        if apart(found, wanted) > NOISE:
            return "the logits"
    return None


class _Following:
    """The simulated path, which goes on with the bytes that are shown."""

    def __init__(self, network: QuantizedNetwork, program: Program, biases: Mapping[str, Tensor]) -> None:
        self.network = network
        self.biases = biases
        self.program = bind(program, network.layers)
        self.values = network.rounded_in(program)
        self.labels = labels_of(program, network.prepared)
        self.makers = {step.value: step for step in program.steps}
        self.names = names_of(program)

    def logits(self, images: Tensor, shown: Mapping[str, Tensor]) -> Tensor:
        """(N, classes); raises `_Otherwise`."""
        known = self.program.begin(images)
        for step in self.program.steps:
            if step.layer is not None:
                step.put(self._layer(step, known, shown), known)
            elif step.operand is not None:
                step.put(self._operand(step.operand, step, known, shown), known)
            else:
                step.run(known)
            if affine := self.values.get(step.value):
                known[step.value] = self._real(known[step.value], step.value, affine, shown, f"{step.value}")
        return known[self.program.logits]

    def _layer(self, step: Step, known: Mapping[Value, Tensor], shown: Mapping[str, Tensor]) -> Tensor:
        assert step.layer is not None
        assert step.call is not None
        layer, label, x = self.network.layers[step.layer], self.labels[step.call], known[step.args[0]]
        value, pads = unpadded(step, self.makers, layer.layer)
        if layer.affine is not None:
            rows, columns = x.shape[-2:] if x.dim() == 4 else (0, 0)
            left, right, above, below = pads
            own = x[..., above : rows - below, left : columns - right] if any(pads) else x
            x = F.pad(self._real(own, value, layer.affine, shown, f"the input of {label}"), pads)
        y = layer(x)
        if (off := self.biases.get(label)) is not None:
            y += off.view(-1, 1, 1) if y.dim() == 4 else off
        return y

    def _operand(self, number: int, step: Step, known: Mapping[Value, Tensor], shown: Mapping[str, Tensor]) -> Tensor:
        affine = self.network.operands[number]
        return self._real(known[step.args[0]], step.value, affine, shown, self.network.prepared.operands[number])

    def _real(self, x: Tensor, value: Value, affine: Affine, shown: Mapping[str, Tensor], place: str) -> Tensor:
        """What the bytes of a value stand for, which have to be the nearest to `x`."""
        whole = shown[bytes_name(self.names[value], affine)].float()
        real = x.double() / affine.scale + affine.zero_point
        if whole.shape != x.shape:
            raise _Otherwise(place)
        off = (whole - real.clamp(0, 2**affine.bits - 1)).abs()
        if not bool((off <= 0.5 + NOISE * (real - affine.zero_point).abs().max()).all()):
            raise _Otherwise(place)
        return (whole - affine.zero_point) * affine.scale


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, in parts of the largest number."""
    if got.shape != want.shape:
        return torch.inf
    return float((got - want).abs().nan_to_num(torch.inf).max() / want.abs().max().clamp_min(1e-30))
