"""What is in a run, in a file of a network or in an allocation file, of which nothing is opened but the file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from tap_agent.paths import RUNS
from tap_agent.runs.folder import RunFolder, find
from tap_agent.sessions.allocation import AllocatedLayer, AllocatedNetwork, read_allocation
from tap_eval.allocation.size import INPUT, packed_size
from tap_eval.export import pt2, safetensors
from tap_eval.export.description import BetweenDescription, Description, LayerDescription, described_operand, made
from tap_eval.export.extra import onnx
from tap_eval.mistake import ExportMistake
from tap_eval.quantization.quantizer import Affine, Allocation

KINDS = "a run's folder, a .safetensors, .onnx or .pt2 file that TAP wrote, or an allocation file (a run's best.json)"


class Inspected(NamedTuple):
    """A file, what is in it, and what is to be said of it."""

    origin: str
    description: Description
    note: str = ""


def inspect(what: str) -> list[Inspected]:
    """What `what` names, as `KINDS` has them: a network each. Raises a `Mistake` of anything else."""
    path = Path(what)
    if path.is_dir() or (not path.exists() and (RUNS / path).is_dir()):
        return _of_run(find(path))
    return _of_file(path)


def _of_run(folder: RunFolder) -> list[Inspected]:
    """The networks that it left, or those of the bits that runs of before left alone."""
    result = folder.finished()
    digests = {file.name: file.sha256 for file in result.files}
    found = []
    for path in folder.models:
        if path == folder.best:
            continue
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == digests.get(path.name)
        note = "" if same else f"{path} is not the file that the run wrote: see its best.json."
        found += [each._replace(note=note) for each in _of_file(path)]
    return found or _of_file(folder.best)


def _of_file(path: Path) -> list[Inspected]:
    match path.suffix:
        case ".safetensors":
            return [Inspected(str(path), safetensors.described(path))]
        case ".pt2":
            return [Inspected(str(path), pt2.described(path))]
        case ".onnx":
            return [Inspected(str(path), onnx().described(path))]
        case ".json":
            try:
                file = read_allocation(path, path.read_text())
            except (OSError, UnicodeDecodeError) as error:
                raise ExportMistake(f"{path} cannot be read ({error}): give {KINDS}.") from error
            about = {name: _text(value) for name, value in file.provenance.items()}
            return [Inspected(str(path), _described(network, about)) for network in file.networks]
        case _:
            raise ExportMistake(f"{path} is nothing to look into: give {KINDS}.")


def _described(network: AllocatedNetwork, provenance: dict[str, str]) -> Description:
    bytewise = {layer.name for layer in network.layers if layer.activation_bits == 8}
    told = network.model_dump(mode="json", exclude={"layers", "between", "operands", "in_float32"}, exclude_unset=True)
    return Description(
        form="an allocation, without weights",
        layers=tuple(map(_layer, network.layers)),
        in_float={tensor.name: tensor.bytes for tensor in network.in_float32.tensors},
        about={name: _text(value) for name, value in told.items()} | provenance,
        between=tuple(
            BetweenDescription(
                each.name,
                made(each.operation, each.of, each.then),
                0 if each.input_of in bytewise else INPUT,
                Affine(each.scale, each.zero_point, 8).range,
            )
            for each in network.between
        )
        + tuple(described_operand(each.name, Affine(each.scale, each.zero_point, 8)) for each in network.operands),
    )


def _layer(layer: AllocatedLayer) -> LayerDescription:
    bits, scales = layer.weight_bits, layer.weight_scales
    known = layer.input_scale is not None and layer.input_zero_point is not None
    affine = Affine(layer.input_scale or 0, layer.input_zero_point or 0, layer.activation_bits)
    allocation = Allocation((bits,), (layer.activation_bits,))
    return LayerDescription(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape or (),
        bits={bits: layer.out_channels} if isinstance(bits, int) else {each: bits.count(each) for each in set(bits)},
        stored="",
        size=packed_size([layer], allocation, 0).total if layer.out_channels else None,
        scales=(min(scales), max(scales)) if scales else None,
        activation_bits=layer.activation_bits,
        inputs=affine.range if known else None,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
