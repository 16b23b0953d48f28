"""A network made ready for quantizing, and proof that it still is the network.

The network runs a few times while it is watched: every product of activations and weights
becomes a layer, batch normalization is folded into the product before it where each is the
other's only partner, and every other tensor is listed with what reads it. Then the prepared
network has to give the original's outputs, on images that were not watched too.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from tap_eval.mistake import NetworkMistake, WeightsMistake
from tap_eval.preparing.discovery import Discovery, Found, Met
from tap_eval.preparing.equivalence import Original, agree, difference
from tap_eval.preparing.layers import Layer, describe
from tap_eval.preparing.outputs import Output, find_output
from tap_eval.preparing.prepared import Prepared, Rest
from tap_eval.preparing.products import Quantizable
from tap_eval.preparing.tracing import Norm, Source, module_of, named_tensors
from tap_eval.preparing.unseen import UNSEEN, outside, read_unseen, shown

_SMALL = 3
"""batches that are looked at for what one pass cannot show, the smallest"""
_MOST_UNDONE = 3
"""foldings that are taken back one by one, before all are"""
_MOST_NAMED = 4


@torch.no_grad()
def prepare(
    network: nn.Module,
    example: Tensor,
    others: Sequence[Tensor] = (),
    *,
    classes: int | None = None,
    output: str | None = None,
) -> Prepared:
    """`network`, copied, in eval mode and float32, with its layers; the network itself is not changed.

    `example` is a batch of images, (N, C, H, W) float32, used to see which layers run and on
    what; `others` are more batches, which may lead elsewhere. Outputs are compared on all of
    them, on random images and on a batch of another size. `classes` and `output` say which of
    several outputs are the logits. Raises `NetworkMistake` when the network does not accept
    the images, has no layer or cannot be prepared without changing what it computes, and
    `WeightsMistake` when a weight is not finite.
    """
    _check_finite(network)
    original = Original.of(network, example)
    noise = torch.randn(example[:1].shape, generator=torch.Generator().manual_seed(0)) * example.std() + example.mean()
    batches = [example, *others, torch.cat([noise, example[:2]]), noise]
    returned = original.run(example)
    logits = find_output(returned, len(example), classes, output)
    expected = [logits.logits(original.run(batch)) for batch in batches]
    if not torch.equal(logits.logits(returned), expected[0]):
        raise NetworkMistake(
            f"{original.name} gives the same images other outputs in a second pass: give a network without random "
            "steps in eval mode."
        )
    named = named_tensors(network)
    strangers = outside(original.run, (example, noise), named_tensors(original.network) | named)
    outsiders = {key: (tensor, f"outside.{place}") for place, (key, tensor) in enumerate(strangers.items())}
    found = _found(original, named, outsiders, batches)
    if not found.products:
        raise NetworkMistake(
            f"{original.name} multiplied no weights with what comes of an image, in no convolution "
            "and in no linear layer: give a network that does, outside of torch.vmap and scripted functions."
        )
    return _checked(original, found, named, logits, batches, expected)


def _found(
    original: Original,
    named: Mapping[int, tuple[Tensor, str]],
    outsiders: dict[int, tuple[Tensor, str]],
    batches: Sequence[Tensor],
) -> Found:
    """What passes over `batches` show; `named` are the tensors of the network as it was given."""
    found = Found(outside=outsiders, kind=batches[0].dtype)
    for batch in batches:
        with Discovery(found, len(batch), named_tensors(original.network), {**named, **outsiders}):
            original.network(batch)
    return found


def _checked(
    original: Original,
    found: Found,
    named: Mapping[int, tuple[Tensor, str]],
    output: Output,
    batches: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> Prepared:
    """The network with as much folded as leaves its outputs what they are."""
    apart: set[str] = set()
    while True:
        prepared = _assembled(original, found, output, batches, apart)
        pairs = zip(batches, expected, strict=True)
        wrong = next((place for pair in pairs if (place := difference(original, prepared, *pair))), None)
        if wrong and _agree_in_float64(original, named, found.outside, output, batches, apart):
            prepared = replace(prepared, notes=(*prepared.notes, _told_of_rounding(prepared, batches, expected)))
            wrong = None
        if wrong is None:
            return _accounted(prepared, found, batches, expected)
        if not prepared.folded:
            raise NetworkMistake(
                f"{original.name} computes something else once its layers are separate, first in {wrong}: give a "
                "network whose code neither sets its weights nor depends on how often it has run."
            )
        names = list(prepared.folded.values())
        before = [name for name in names if wrong.startswith(name.rpartition(".")[0])] or names
        apart |= set(names if len(apart) >= _MOST_UNDONE else before[:1])


def _agree_in_float64(
    original: Original,
    named: Mapping[int, tuple[Tensor, str]],
    outsiders: dict[int, tuple[Tensor, str]],
    output: Output,
    batches: Sequence[Tensor],
    apart: set[str],
) -> bool:
    """Whether the network, prepared likewise where neither weights nor activations are rounded, is the original."""
    wide, doubles = original.in_float64(), [batch.double() for batch in batches]
    try:
        found = _found(wide, named, outsiders, doubles)
    except Exception:  # noqa: BLE001 a step takes float32 alone: whatever the network's code raises then
        return False
    return agree(wide, _assembled(wide, found, output, doubles, apart), doubles)


def _told_of_rounding(prepared: Prepared, batches: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    worst = max(
        float((prepared(batch) - logits).abs().max() / logits.abs().max())
        for batch, logits in zip(batches, expected, strict=True)
    )
    return (
        f"it is sensitive to rounding: in float32 its outputs are up to {100 * worst:.2g} % of the largest logit from "
        "the original's; in float64 they agree"
    )


def _accounted(prepared: Prepared, found: Found, batches: Sequence[Tensor], expected: Sequence[Tensor]) -> Prepared:
    """With what is read unseen in `rest`: what no function was seen to read must not matter to the smallest batches."""
    seen = {rest.name for rest in prepared.rest if rest.used} | found.biases
    saved = prepared.network.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in prepared.network.named_buffers() if name in saved]
    state = (*prepared.network.named_parameters(), *buffers)
    sizes = {
        name: tensor.numel()
        for name, tensor in state
        if name not in seen and tensor.dtype.is_floating_point and tensor.layout is torch.strided
    }
    small = sorted(zip(batches, expected, strict=True), key=lambda pair: len(pair[0]))[:_SMALL]
    unseen = read_unseen(prepared, list(sizes), small)
    rest = [each for each in prepared.rest if each.name not in unseen]
    return replace(prepared, rest=(*rest, *(Rest(name, UNSEEN, sizes[name]) for name in sizes if name in unseen)))


def _assembled(
    original: Original, found: Found, output: Output, batches: Sequence[Tensor], apart: set[str]
) -> Prepared:
    """The network as it was found, batch normalization folded but for those called as in `apart`."""
    modules: list[Quantizable] = []
    folded: dict[int, str] = {}
    for index, (key, met) in enumerate(found.products.items()):
        norm = found.foldable(key)
        if len(met.biases) > 1:
            met.module.bias = None
        if norm and norm.name not in apart:
            folded[index] = norm.name
            modules.append(_folded(met.module, norm))
        else:
            modules.append(met.module)
    names = _names([met.source for met in found.products.values()])
    layers = tuple(
        describe(name, module, met.uses, met.images, index, len(modules))
        for index, (name, module, met) in enumerate(zip(names, modules, found.products.values(), strict=True))
    )
    stay = sorted(set(apart) & {name for met in found.products.values() for name in met.norms})
    notes = [_stay_apart(stay)] if stay else []
    notes += _counted_again(original.network, names, layers, list(found.products.values()))
    if floats := [tensor for tensor, _ in found.outside.values() if tensor.is_floating_point() and tensor.dim()]:
        notes.append(f"it reads tensors that none of its modules holds, and they count as its own: {shown(floats)}")
    rest = tuple(_rest(original.network, found, set(folded.values())))
    return Prepared(
        original.network,
        layers,
        tuple(modules),
        {key: index for index, key in enumerate(found.products)},
        folded,
        frozenset(key for key, met in found.products.items() if len(met.biases) > 1),
        rest,
        output,
        tuple(batches),
        tuple(found.originals.values()),
        (*original.notes, *notes),
        _repeated(original.network, layers, list(found.products.values()), rest),
    )


def _stay_apart(names: Sequence[str]) -> str:
    """What is said of batch normalizations that are not folded."""
    if len(names) == 1:
        return f"{names[0]} stays apart: folded, it would change outputs"
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{', '.join(names[:_MOST_NAMED])}{more} stay apart: folded, they would change outputs"


def _folded(module: Quantizable, norm: Norm) -> Quantizable:
    """A copy of `module` that does what batch normalization does after it."""
    assert norm.mean is not None
    assert norm.variance is not None
    fuse: Any = fuse_conv_bn_weights if isinstance(module, nn.Conv2d) else fuse_linear_bn_weights
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    weight = module.weight.double()
    bias = None if module.bias is None else module.bias.double()
    given = [None if value is None else value.double() for value in (norm.mean, norm.variance, norm.weight, norm.bias)]
    weight, bias = fuse(weight, bias, given[0], given[1], norm.eps, given[2], given[3])
    made.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    made.bias = nn.Parameter(bias.to(module.weight.dtype), requires_grad=False)
    return made


def _names(sources: Sequence[Source]) -> list[str]:
    """A name for each layer: that of the module whose weight it has, with a number where several have parts of one."""
    names: list[str] = []
    for source in sources:
        modules = sorted({module_of(root) for root in source.roots}, key=len)
        name = modules[0] or min(source.roots)
        again = sum(other == name or other.startswith(f"{name}[") for other in names)
        names.append(f"{name}[{again}]" if again else name)
    return names


def _counted_again(
    network: nn.Module, names: Sequence[str], layers: Sequence[Layer], products: Sequence[Met]
) -> Iterable[str]:
    """What is to be said of weights that are multiplied in several ways."""
    sizes = {name: tensor.numel() for tensor, name in named_tensors(network).values()}
    for root in {root: None for met in products for root in met.source.roots}:
        ways = [index for index, met in enumerate(products) if met.source.roots == {root}]
        if sum(layers[index].params for index in ways) > sizes.get(root, math.inf) and len(ways) > 1:
            yield (
                f"{root} is multiplied in {len(ways)} ways, as {', '.join(names[index] for index in ways)}: each has "
                "bits of its own, and counts"
            )


def _repeated(network: nn.Module, layers: Sequence[Layer], products: Sequence[Met], rest: Sequence[Rest]) -> int:
    """Elements of weights that are multiplied in several ways, or read otherwise too, beyond those that there are."""
    sizes = {name: tensor.numel() for tensor, name in named_tensors(network).values()}
    held: Counter[str] = Counter()
    for layer, met in zip(layers, products, strict=True):
        if len(met.source.roots) == 1:
            held.update(dict.fromkeys(met.source.roots, layer.params))
    read = {each.name: each.count for each in rest if each.used}
    return sum(max(held[root] + read.get(root, 0) - size, 0) for root, size in sizes.items() if root in held)


def _rest(network: nn.Module, found: Found, folded: set[str]) -> Iterable[Rest]:
    """Parameters and saved buffers that no layer holds: read in float32 by something else, or by nothing.

    What a module has computed from a parameter once and kept is read in the parameter's place. Where a weight is
    called with several biases, they are added afterwards.
    """
    weights = {root for met in found.products.values() for root in met.source.roots}
    apart = {name for met in found.products.values() if len(met.biases) > 1 for name in met.biases}
    kept = _kept(network, found)
    saved = network.state_dict(keep_vars=True).values()
    ids = {id(tensor) for tensor in (*network.parameters(), *saved)}
    for path, module in network.named_modules():
        for name, tensor in (*module.named_parameters(path, recurse=False), *module.named_buffers(path, recurse=False)):
            if id(tensor) not in ids:
                continue
            ids.remove(id(tensor))
            readers = found.readers.get(name, set()) | ({"add"} if name in apart else set())
            if not (tensor.is_floating_point() or tensor.is_complex()) or (
                name in weights | found.biases and not readers
            ):
                continue
            if module_of(name) in folded and readers <= {"batch_norm"}:
                continue
            readers = readers or kept.get(path, set())
            if readers or isinstance(tensor, nn.Parameter):
                yield Rest(name, ", ".join(sorted(readers)), _reals(tensor))
    norms = [norm for met in found.products.values() for norm in met.norms.values() if norm.name in folded]
    away = {id(tensor) for norm in norms for tensor in (norm.mean, norm.variance, norm.weight, norm.bias)}
    for tensor, name in found.outside.values():
        if name in found.readers and not (id(tensor) in away and found.readers[name] == {"batch_norm"}):
            yield Rest(name, ", ".join(sorted(found.readers[name])), _reals(tensor))


def _reals(tensor: Tensor) -> int:
    """Its elements, or of complex ones the real and the imaginary parts."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _kept(network: nn.Module, found: Found) -> dict[str, set[str]]:
    """What reads the tensors that a module keeps beside its parameters and buffers, by the module's name."""
    registered = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    modules = dict(network.named_modules())
    kept: dict[str, set[str]] = {}
    for tensor, name in named_tensors(network).values():
        if id(tensor) not in registered and (readers := found.readers.get(name)):
            owner = name
            while owner not in modules:
                owner = owner.rpartition(".")[0]
            kept.setdefault(owner, set()).update(readers)
    return kept


def _check_finite(network: nn.Module) -> None:
    statistics = [(name, buffer) for name, buffer in network.named_buffers() if "running_" in name]
    for name, tensor in (*network.named_parameters(), *statistics):
        if is_lazy(tensor) or tensor.is_meta:
            raise WeightsMistake(
                f"{name} of {type(network).__name__} has no values yet: give a network whose weights are loaded"
                + (", and that ran once, as lazy modules need." if is_lazy(tensor) else " and lie on a device.")
            )
        if tensor.layout is torch.strided and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise WeightsMistake(
                f"{name} of {type(network).__name__} has {count:,} of {math.prod(tensor.shape):,} values that are NaN "
                "or infinite: give weights of a training run that did not diverge."
            )
