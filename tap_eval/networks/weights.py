"""Weights from a file, put into a network that they fit exactly; what does not fit is told, nothing is guessed."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tap_eval.mistake import WeightsMistake
from tap_eval.networks.checkpoint import Checkpoint, Table

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""what DataParallel, torch.compile and their like put into the names of all that they wrap"""
_DOTTED = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
"""names in torchvision's published DenseNets, which had a dot there"""
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|averaged|shadow)(?:$|[._])", re.IGNORECASE)
_COUNTS = ("num_batches_tracked", "n_averaged")
"""count steps of training, which inference does not read"""


@dataclass(frozen=True)
class _Fit:
    """How a table fits a network."""

    table: Table
    state: Mapping[str, Tensor]
    """by the network's names"""
    metadata: Mapping[str, Any]
    """by the network's names of modules, empty where the file has none"""
    common: int
    """tensors of which both know the name"""
    missing: Sequence[str]
    """names that the file lacks"""
    extra: Sequence[str]
    """names that the network lacks, as they are in the file"""
    shapes: Mapping[str, tuple[torch.Size, torch.Size]]
    """of tensors that differ, in the file and in the network"""
    values: Sequence[str]
    """clauses about what torch would take in silence"""


@torch.no_grad()
def load_weights(network: nn.Module, name: str, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Puts the weights that fit exactly into `network`, called `name`; gives notes on what was taken.

    Mappings around a state dict, prefixes that all its names have, and the parts that wrappers
    put into names are seen through. Raises `WeightsMistake` where no table fits, where several
    do, and for values that are not finite.
    """
    ours = {str(tensor.dtype) for tensor in _tensors(network).values()}
    settled = {key: buffer for key, buffer in network.named_buffers() if not is_lazy(buffer)}
    odd = {key: buffer.clone() for key, buffer in settled.items() if not buffer.isfinite().all()}
    fits = [_fit(table, network) for table in checkpoint.tables]
    fitting = [fit for fit in fits if _load(network, fit)]
    if not fitting:
        raise WeightsMistake(_misfit(network, name, checkpoint, fits))
    taken, notes = _choice(checkpoint.path, fitting)
    _load(network, taken)
    for key, tensor in _tensors(network).items():
        wrong = ~tensor.isfinite() & (tensor != odd[key] if key in odd else True)
        if wrong.any():
            raise WeightsMistake(
                f"{key} in {checkpoint.path} holds {int(wrong.sum()):,} of {wrong.numel():,} values that are NaN or "
                "infinite: give weights of a training that went well."
            )
    kept = {str(tensor.dtype) for tensor in taken.state.values() if tensor.is_floating_point()}
    if narrow := kept - ours - {"torch.float64"}:
        kinds = ", ".join(sorted(narrow)).replace("torch.", "")
        notes += (f"{checkpoint.path.name} holds weights in {kinds}, with which {name} computes in its own precision",)
    return notes


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state, of which tied ones are one object."""
    return {key: value for key, value in network.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _plain(names: Iterable[str]) -> dict[str, str]:
    """The names by what is left of them without the parts that wrappers put in."""
    names = list(names)
    parts = [[part for part in name.split(".") if part not in _WRAPPERS] for name in names]
    plain = {_DOTTED.sub(r"\1\2.", ".".join(each)): name for each, name in zip(parts, names, strict=True)}
    return plain if len(plain) == len(names) else {name: name for name in names}


def _prefixes(names: Iterable[str]) -> list[str]:
    """What all names begin with, part by part: "", `model.`, `model.backbone.`."""
    parts = [name.split(".")[:-1] for name in names]
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(parts), max(parts), strict=False))
    return [*itertools.accumulate((f"{part}." for part, _ in pairs), initial="")]


def _fit(table: Table, network: nn.Module) -> _Fit:
    """The table under the network's names, by the prefixes with which most of them agree."""
    expected = _tensors(network)
    constant = {key: buffer for key, buffer in network.named_buffers() if key not in expected}
    held, known = _plain(table.tensors), _plain([*expected, *constant])

    def agreeing(prefixes: tuple[str, str]) -> int:
        theirs, ours = prefixes
        return sum(ours + name[len(theirs) :] in known for name in held)

    theirs, ours = max(itertools.product(_prefixes(held), _prefixes(known)), key=agreeing)
    state: dict[str, Tensor] = {}
    extra, values, shapes = [], [], {}
    for plain, original in held.items():
        key = known.get(ours + plain[len(theirs) :], ours + plain[len(theirs) :])
        tensor = table.tensors[original].detach()
        if key in constant:
            if not torch.equal(tensor, constant[key].to(tensor.dtype)):
                values.append(f"{key} differs from the network's own, which no state dict replaces")
            continue
        if key not in expected:
            if key.endswith(_COUNTS):
                continue
            extra.append(original)
        elif not is_lazy(expected[key]):
            if tensor.shape != expected[key].shape:
                shapes[key] = tensor.shape, expected[key].shape
            if kind := _unlike(tensor, expected[key]):
                values.append(f"{key} is {kind}")
        state[key] = tensor
    tied = {id(expected[key]): tensor for key, tensor in state.items() if key in expected}
    rest = {
        key: tensor if key.endswith(_COUNTS) else tied.get(id(tensor))
        for key, tensor in expected.items()
        if key not in state
    }
    state |= {key: tensor for key, tensor in rest.items() if tensor is not None}
    missing = [key for key, tensor in rest.items() if tensor is None]
    metadata = {}
    for place, each in (table.metadata or {}).items():
        plain = "".join(f"{part}." for part in place.split(".") if part not in _WRAPPERS)
        metadata[(ours + plain.removeprefix(theirs)).strip(".")] = each
    return _Fit(table, state, metadata, agreeing((theirs, ours)), missing, extra, shapes, values)


def _unlike(tensor: Tensor, expected: Tensor) -> str | None:
    """What kind of tensor it is, where that is no kind of which plain numbers become."""
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
        return "quantized" if tensor.is_quantized else "without values" if tensor.is_meta else "sparse"
    if expected.is_floating_point() and not tensor.is_floating_point():
        return f"of {tensor.dtype}, not of floating point"
    return None


def _load(network: nn.Module, fit: _Fit) -> bool:
    """Whether the network takes the table; torch has the last word, since modules may read older forms of theirs."""
    if fit.values or not fit.common:
        return False
    own = getattr(network.state_dict(), "_metadata", None)
    for metadata in (fit.metadata or None, own):
        state = OrderedDict(fit.state)
        state.__dict__["_metadata"] = metadata
        try:
            network.load_state_dict(state)
        except Exception:  # noqa: BLE001, S112 networks have code of their own here; what is wrong is told by comparison
            continue
        return True
    return False


def _choice(path: Path, fitting: Sequence[_Fit]) -> tuple[_Fit, tuple[str, ...]]:
    """Which of the tables that fit is taken: averages of weights over training, where both are there."""
    different: list[_Fit] = []
    for fit in fitting:
        if not any(_same(fit.state, other.state) for other in different):
            different.append(fit)
    if len(different) == 1:
        return different[0], ()
    averaged = [fit for fit in different if _AVERAGED.search(fit.table.place)]
    places = [f"'{fit.table.place or path.name}'" for fit in different]
    if len(averaged) > 1 or len(different) > 2 or not averaged:
        raise WeightsMistake(
            f"{path} holds several state dicts that fit, {' and '.join(places)}: save the one that is meant alone."
        )
    taken, other = places if different[0] is averaged[0] else reversed(places)
    return averaged[0], (
        f"{path.name} holds weights of training in {other} and their average in {taken}, which is taken: "
        f"save {other} alone to have that",
    )


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def _misfit(network: nn.Module, name: str, checkpoint: Checkpoint, fits: Sequence[_Fit]) -> str:
    """The sentence on a file of which no table fits, from the table that comes nearest."""
    best = max(fits, key=lambda fit: (fit.common, -len(fit.missing)), default=None)
    if best is None or (checkpoint.contents and not best.common):
        return f"{checkpoint.path} holds {checkpoint.contents}, no state dict: save network.state_dict()."
    for table in checkpoint.tables:
        parts = _parts(table)
        if inside := [part for part in parts if _load(network, _fit(parts[part], network))]:
            beside = next(iter(parts[next((part for part in parts if part not in inside), inside[-1])].tensors))
            return (
                f"{_start(checkpoint, table, name)} what begins with {' or '.join(inside)} would, but {beside} is "
                "beside it; save what is meant alone."
            )
    start = _start(checkpoint, best.table, name)
    tensors = list(best.table.tensors)
    if 2 * best.common < len(tensors):
        known, other = best.common or "none", (best.extra or tensors)[0]
        return (
            f"{start} of its {len(tensors)} tensors {known} have names of {name}'s, {other} has not; give weights of "
            f"{name}."
        )
    if head := _head(best):
        key, theirs, ours = head
        return (
            f"{start} its head {key} tells {theirs:,} classes apart, that of {name} {ours:,}; give --network "
            f"package.module:factory for a network of {theirs:,} classes."
        )
    shapes = [f"{key} has shape {tuple(theirs)}, not {tuple(ours)}" for key, (theirs, ours) in best.shapes.items()]
    absent = [f"{key} is missing" for key in best.missing] + [f"{key} is not of this network" for key in best.extra]
    problems = [*absent, *shapes, *best.values] or ["torch refuses it"]
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{start} {problems[0]}{more}; give weights of {name}."


def _start(checkpoint: Checkpoint, table: Table, name: str) -> str:
    return f"{checkpoint.path}{f' in its {table.place!r}' if table.place else ''} does not fit {name}:"


def _parts(table: Table) -> dict[str, Table]:
    """What begins alike, by that beginning, where there are several."""
    common = _prefixes(table.tensors)[-1]
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in table.tensors.items():
        parts.setdefault(f"{common}{key[len(common) :].split('.')[0]}.", {})[key] = tensor
    return {part: Table(table.place, tensors) for part, tensors in parts.items()} if len(parts) > 1 else {}


def _head(fit: _Fit) -> tuple[str, int, int] | None:
    """The last weight, its outputs in the file and in the network, where nothing but their number differs."""
    pairs = {(theirs[:1], ours[:1]) for theirs, ours in fit.shapes.values()}
    alike = all(theirs[1:] == ours[1:] for theirs, ours in fit.shapes.values())
    weights = [key for key, (theirs, _) in fit.shapes.items() if len(theirs) > 1]
    if fit.missing or fit.extra or fit.values or not alike or len(pairs) != 1 or not weights:
        return None
    theirs, ours = fit.shapes[weights[-1]]
    return weights[-1], theirs[0], ours[0]
