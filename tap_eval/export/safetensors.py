"""A quantized network as a file of safetensors: packed integers, scales, biases, and what stays in float32.

Of each layer, by the name that it has in the user's network, the file holds

- `NAME.weight_packed_B` (rows, bytes) uint8: the rows of the output channels that have B bits, in the order of the
  channels, packed as `tap_eval.export.packing` says;
- `NAME.weight_bits` (O,) uint8 where channels differ in bits;
- `NAME.weight_scale` and `NAME.corrected_bias` (O,) float32;
- `NAME.input_scale` () float32 and `NAME.input_zero_point` () uint8;

and of each value between layers that is rounded to other integers than a layer's input, by the name that
`tap_eval.export.between` gives it, and of each operand of a product of two activations that is in integers,
`NAME.scale` () float32 and `NAME.zero_point` () uint8.

These are the bytes that `tap_eval.allocation.size` counts. What no layer holds has its own name and type. The structure
is JSON under the one key `tap` of the metadata: the order of several keys would be another in each file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tap_eval.allocation.size import INPUT
from tap_eval.export.between import Between, between
from tap_eval.export.description import BetweenDescription, Description, LayerDescription, described_operand, made
from tap_eval.export.header import FORMAT, BetweenRecord, Header, LayerRecord, header_of, told_between
from tap_eval.export.packing import packed, unpacked
from tap_eval.export.remaining import Remaining, remaining
from tap_eval.measuring.recorder import Recorder
from tap_eval.mistake import ExportMistake
from tap_eval.preparing.prepared import Prepared, attending
from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.calibration import Observation, groups_of
from tap_eval.quantization.integer import Unfit
from tap_eval.quantization.quantizer import Affine, Allocation, QuantizedNetwork, QuantizedWeight
from tap_eval.quantization.ranges import Range
from tap_eval.quantization.rounding import Rounded
from tap_eval.quantization.sums import Sums

_KEY = "tap"


def write(
    path: Path, network: QuantizedNetwork, allocation: Allocation, about: Mapping[str, Any], *, strict: bool = False
) -> Remaining:
    """Writes a network on the CPU, which has the bits of `allocation`, to `path`; the same bytes each time.

    `about` is what else the file is to say of it, as JSON. Gives what is in float32. Raises `ExportMistake` for what
    the format has no place for, and if `strict` where anything is in float32.
    """
    values, left = between(network), remaining(network)
    if strict:
        left.refuse(path.name)
    header = header_of(network, allocation, values, about)
    path.write_bytes(save(_tensors(network, allocation, values or ()), {_KEY: header.model_dump_json()}))
    return left


def _tensors(network: QuantizedNetwork, allocation: Allocation, values: Sequence[Between]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided:
            raise ExportMistake(
                f"{name} is sparse, which safetensors does not hold: give a network that holds it dense."
            )
        if name in found:
            raise ExportMistake(f"two tensors of the network are called {name} in the file: rename a module.")
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        found[name] = real.clone(memory_format=torch.contiguous_format)

    for name, tensor in network.prepared.in_float().items():
        put(name, tensor)
    for layer, quantized, bits in zip(network.prepared.layers, network.layers, allocation.weights, strict=True):
        weight, affine = quantized.weight, quantized.affine
        if weight is None or affine is None:
            raise ValueError(f"{layer.name} has no bits")
        each = torch.tensor(bits).expand(layer.out_channels)
        if bool((weight.integers.flatten(1).abs().amax(1) >= 2 ** (each - 1)).any()):
            raise ValueError(f"{layer.name} does not have the bits of the allocation")
        for one in sorted(set(each.tolist())):
            put(f"{layer.name}.weight_packed_{one}", packed(weight.integers[each == one], one))
        if len(set(each.tolist())) > 1:
            put(f"{layer.name}.weight_bits", each.to(torch.uint8))
        put(f"{layer.name}.weight_scale", weight.scale)
        put(f"{layer.name}.corrected_bias", weight.bias)
        put(f"{layer.name}.input_scale", torch.tensor(affine.scale, dtype=torch.float32))
        put(f"{layer.name}.input_zero_point", torch.tensor(affine.zero_point, dtype=torch.uint8))
    own = [each for each in values if each.layer is None or each.affine != network.layers[each.layer].affine]
    named = [(each.name, each.affine) for each in own]
    for name, affine in (*named, *zip(network.prepared.operands, network.operands, strict=True)):
        put(f"{name}.scale", torch.tensor(affine.scale, dtype=torch.float32))
        put(f"{name}.zero_point", torch.tensor(affine.zero_point, dtype=torch.uint8))
    return found


class _File:
    """A file that `write` wrote, open; raises `ExportMistake` for any other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
        except OSError as error:
            raise ExportMistake(
                f"{path} cannot be read ({error.strerror or error}): give a file that is there."
            ) from error
        except SafetensorError as error:
            raise ExportMistake(f"{path} is not safetensors, or cut off ({error}): write it anew.") from error
        if text is None:
            raise ExportMistake(
                f"{path} does not hold a network that TAP quantized: give a run's model.safetensors, or what "
                "`tap-agent apply --out FILE.safetensors` wrote."
            )
        try:
            version = json.loads(text)["format"]
            if version != FORMAT:
                raise ExportMistake(
                    f"{path} is of format {version}, and this version of TAP reads {FORMAT}: write it anew."
                )
            self.header = Header.model_validate_json(text)
        except (ValidationError, ValueError, TypeError, KeyError) as error:
            self._damaged(" ".join(str(error).split())[:200], error)
        for name in self.header.in_float:
            self._take(name)
        for layer in self.header.layers:  # before room is made for what it claims to have
            self._take(f"{layer.name}.weight_scale", torch.float32, layer.shape[:1])

    def _damaged(self, what: str, error: Exception | None = None) -> NoReturn:
        raise ExportMistake(f"{self.path} is damaged ({what}): write it anew.") from error

    def _take(self, name: str, kind: torch.dtype | None = None, shape: Sequence[int] = ()) -> Tensor:
        """A tensor; of a `kind`, it must have that and the shape."""
        tensor = self.tensors.get(name)
        if tensor is None:
            self._damaged(f"it has no {name}")
        if kind is not None and (tensor.dtype != kind or tuple(tensor.shape) != tuple(shape)):
            self._damaged(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {kind} {tuple(shape)}")
        return tensor

    def bits(self, layer: LayerRecord) -> Tensor:
        """(O,) int64."""
        if len(layer.bits) > 1:
            return self._take(f"{layer.name}.weight_bits", torch.uint8, layer.shape[:1]).long()
        return torch.full(layer.shape[:1], layer.bits[0])

    def packed(self, layer: LayerRecord) -> dict[int, Tensor]:
        """Rows by their bits."""
        each = self.bits(layer)
        if set(each.tolist()) != set(layer.bits):
            self._damaged(f"{layer.name} has channels of other bits than {layer.bits}")
        return {
            bits: self._take(
                f"{layer.name}.weight_packed_{bits}",
                torch.uint8,
                (int((each == bits).sum()), -(-layer.row * bits // 8)),
            )
            for bits in layer.bits
        }

    def weight(self, layer: LayerRecord) -> QuantizedWeight:
        """Its integers, scales and bias."""
        each = self.bits(layer)
        integers = torch.zeros(layer.shape[0], layer.row, dtype=torch.int8)
        for bits, rows in self.packed(layer).items():
            integers[each == bits] = unpacked(rows, bits, layer.row)
        scale, bias = (
            self._take(f"{layer.name}.{part}", torch.float32, layer.shape[:1])
            for part in ("weight_scale", "corrected_bias")
        )
        return QuantizedWeight(integers.view(layer.shape), scale, bias, each.to(torch.int8))

    def affine(self, layer: LayerRecord) -> Affine:
        """The integers of its input."""
        return self._affine(f"{layer.name}.input_scale", f"{layer.name}.input_zero_point", layer.activation_bits)

    def _affine(self, name: str, name_of_zero: str, bits: int) -> Affine:
        scale = float(self._take(name, torch.float32))
        zero_point = int(self._take(name_of_zero, torch.uint8))
        if not (0 < scale < math.inf and zero_point < 2**bits):
            self._damaged(f"{name} is {scale} and {name_of_zero} {zero_point}")
        return Affine(scale, zero_point, bits)

    def between(self, value: BetweenRecord) -> Affine:
        """The integers of a value between layers."""
        if value.has_own_integers:
            return self._affine(f"{value.name}.scale", f"{value.name}.zero_point", 8)
        return self.affine(self._layer(str(value.input_of)))

    def operand(self, name: str) -> Affine:
        """The integers of an operand of a product of two activations."""
        return self._affine(f"{name}.scale", f"{name}.zero_point", 8)

    def inputs(self) -> list[tuple[Range, Range]]:
        """Of each layer, a range of its input that leads to just its integers, and one to those of what has its range
        in 8 bits."""
        found = {layer.name: (self.affine(layer).range,) * 2 for layer in self.header.layers}
        for value in self.header.between or ():
            if value.input_of is not None and value.range is not None:
                layer = self._layer(value.input_of)
                own = value.input_range or value.range
                covered = Affine.covering(*own, layer.activation_bits), Affine.covering(*value.range, 8)
                if covered != (self.affine(layer), self.between(value)):
                    self._damaged(f"{value.name} has another range than the input of {layer.name}")
                found[layer.name] = own, value.range
        return list(found.values())

    def _layer(self, name: str) -> LayerRecord:
        found = next((layer for layer in self.header.layers if layer.name == name), None)
        return found or self._damaged(f"it has no layer {name}")


def read(path: Path, prepared: Prepared) -> QuantizedNetwork:
    """The network in a file that `write` wrote of `prepared`; it has no other bits than those.

    Raises `ExportMistake` where it is no such file, or one of another network.
    """
    file = _File(path)
    prepared = attending(prepared) if file.header.operands else replace(prepared, operands=())
    if prepared.operands != file.header.operands:
        _foreign(path, "its products of two activations are others")
    structures = [(layer.name, layer.shape) for layer in file.header.layers]
    for (name, shape), layer, module in zip(structures, prepared.layers, prepared.modules, strict=False):
        if (name, shape) != (layer.name, tuple(module.weight.shape)):
            _foreign(path, f"it has {name} {shape} in the place of {layer.name} {tuple(module.weight.shape)}")
    if len(structures) != len(prepared.layers):
        _foreign(path, f"it has {len(structures)} layers in place of {len(prepared.layers)}")
    for name, tensor in prepared.in_float().items():
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if name not in file.tensors or not torch.equal(real, file.tensors[name]):
            _foreign(path, f"{name}, which stays in float, is another")
    seen = [_covered(*each) for each in zip(file.inputs(), file.header.layers, prepared.modules, strict=True)]
    layers, values = file.header.layers, file.header.between
    own = [file.between(value).range for value in values or () if value.input_of is None]
    sums = None if values is None else Sums(tuple(own), Recorder(prepared, prepared.watched[0]))
    operands = [file.operand(name).range for name in prepared.operands]
    network = QuantizedNetwork(prepared, seen, [_no_other(path) for _ in seen], sums, operands)
    network.take([file.weight(layer) for layer in layers], [layer.activation_bits for layer in layers])
    try:
        told = [told_between(value, network) for value in between(network) or ()]
    except (Unfit, ValueError) as error:
        _foreign(path, f"its values between layers are others ({error})")
    if told != list(values or ()):
        _foreign(path, "its values between layers are others")
    return network


def _foreign(path: Path, how: str) -> NoReturn:
    raise ExportMistake(
        f"{path} is of another network: {how}; give the network and the weights that it was written of."
    )


def _covered(ranges: tuple[Range, Range], layer: LayerRecord, module: Quantizable) -> Observation:
    """An input of such ranges at its bits and at 8, of whose mean nothing is known."""
    inputs, *kernel = module.weight.shape[1:]
    own, eight = ranges
    fewer = {layer.activation_bits: own} if layer.activation_bits < 8 else {}
    return Observation(*eight, torch.zeros(groups_of(module) * inputs, *kernel), 1, fewer)


def _no_other(path: Path) -> Any:
    def integers(bits: int) -> Rounded:
        raise ExportMistake(f"{path} holds the network at its own bits alone, and not at {bits}: quantize it anew.")

    return integers


def described(path: Path) -> Description:
    """What is in a file that `write` wrote; raises `ExportMistake` of any other."""
    file = _File(path)
    layers = []
    for layer in file.header.layers:
        affine, rows, scales = file.affine(layer), file.packed(layer), file.weight(layer).scale
        own = [f"{layer.name}.{part}" for part in ("weight_scale", "corrected_bias", "input_scale", "input_zero_point")]
        own += [f"{layer.name}.weight_bits"] if len(rows) > 1 else []
        layers.append(
            LayerDescription(
                name=layer.name,
                kind=layer.kind,
                shape=layer.shape,
                bits={bits: len(each) for bits, each in rows.items()},
                stored="uint8, packed",
                size=sum(file.tensors[name].nbytes for name in own) + sum(each.nbytes for each in rows.values()),
                scales=(float(scales.min()), float(scales.max())),
                activation_bits=affine.bits,
                inputs=affine.range,
            )
        )
    values = sum(tensor.nbytes for tensor in file.tensors.values())
    return Description(
        form="safetensors, packed",
        layers=tuple(layers),
        in_float={name: file.tensors[name].nbytes for name in file.header.in_float},
        about={name: each if isinstance(each, str) else json.dumps(each) for name, each in file.header.about.items()},
        overhead=path.stat().st_size - values,
        between=tuple(
            BetweenDescription(
                name=value.name,
                made=made(value.operation, value.of, value.then),
                size=INPUT if value.has_own_integers else 0,
                reach=file.between(value).range,
            )
            for value in file.header.between or ()
        )
        + tuple(described_operand(name, file.operand(name)) for name in file.header.operands),
    )
