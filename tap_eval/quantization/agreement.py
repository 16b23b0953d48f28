"""Whether a recorded network, or one in integers, computes what it stands for, judged step by step on equal inputs.

Floats that are added in another order have other last bits, now and then a last bit decides a
rounding, and after it everything differs, the more the deeper the network is: outputs cannot
tell this from a fault. So two ways are led side by side, and what the one has computed takes
the place of what the other has before the next step is judged. Two ways that agree in every
step differ by single roundings, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import Environment, Program, Step, bind
from tap_eval.quantization.integer import IntegerNetwork
from tap_eval.quantization.kernels import padded
from tap_eval.quantization.quantizer import Affine, QuantizedNetwork
from tap_eval.quantization.rewriting import Bytes

NOISE = 1e-4
"""of the largest value: more than the order of additions makes, less than a fault does"""


@torch.inference_mode()
def recorded_otherwise(prepared: Prepared, program: Program, pixels: Tensor) -> str | None:
    """Where `program` first computes something else than the network that it was recorded from, None if nowhere.

    `pixels` are (N, C, H, W), with N the program's batch. Both are in full precision; judged are
    the inputs of layers and the logits.
    """
    known, steps, numbers = program.begin(pixels), iter(program.steps), count()
    calls = {step.call: step for step in program.steps if step.layer is not None}
    found: list[str] = []

    def followed(index: int, module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            step = calls.get(next(numbers))
            if step is None or found:
                return module(x)
            for earlier in takewhile(lambda each: each is not step, steps):
                earlier.run(known)
            if step.layer != index or _apart(known[step.args[0]], x) > NOISE:
                found.append(f"the input of {prepared.layers[index].name}")
            y = module(x)
            step.put(y.clone(), known)  # the network may change it in place
            return y

        return call

    logits = prepared(pixels, [followed(index, module) for index, module in enumerate(prepared.modules)])
    for step in steps if not found else ():
        if step.layer is not None:
            return f"{prepared.layers[step.layer].name}, which did not run"
        step.run(known)
    if not found and _apart(known[program.logits], logits) > NOISE:
        return "the logits"
    return found[0] if found else None


@torch.inference_mode()
def multiplied_otherwise(
    fast: IntegerNetwork, program: Program, network: QuantizedNetwork, pixels: Tensor
) -> str | None:
    """The first step of `fast` that gives something else than the layers of `network` do, None if there is none.

    `fast` was made of the two and has the bits that `network` has; `pixels` are as above. Floats
    may differ by noise, and bytes have to be the nearest.
    """
    theirs, ours = program.begin(pixels), fast.program.begin(pixels)
    others = iter(bind(network.multiplied(program), network.layers).steps)
    sums = {each.value: affine for each, affine in network.carried(program.steps, program.logits) if not each.alone}
    judged = {step.value for step in fast.program.steps}
    expected: Environment = {}
    layer = "the pixels"
    for step in fast.program.steps:
        whole, affine = fast.in_bytes.get(step.value, (step.value, None))
        if whole is not step.value:
            expected[step.value] = _in_float(step, fast.in_bytes, ours)
        while step.value not in expected:
            other = next(others)
            other.run(theirs)
            if other.value in judged:
                expected[other.value] = theirs[other.value]
            if other.value in sums:  # what is judged is what it is nearest to
                theirs[other.value] = sums[other.value].rounded(theirs[other.value])
        step.run(ours)
        if step.layer is not None:
            layer = network.prepared.layers[step.layer].name
        pairs = list(zip(_parts(ours[step.value]), _parts(expected.pop(step.value)), strict=True))
        if not _is_blank(step) and any(_apart(got, want, affine) > NOISE for got, want in pairs):
            return layer if step.layer is not None else f"{step.value} after {layer}"
        equal = [_equal(got, want, affine) for got, want in pairs]
        ours[step.value] = tree_map_only(Tensor, partial(_next, iter(equal)), ours[step.value])
    return None


def _in_float(step: Step, in_bytes: Bytes, known: Environment) -> Tensor:
    """What a step gives that makes bytes of numbers, bytes of bytes, or numbers of bytes: as numbers."""
    value, *others = step.args
    _, affine = in_bytes.get(value, (value, None))
    x = known[value]
    real = x if affine is None else (x.float() - affine.zero_point) * affine.scale
    return F.pad(real, others[0]) if step.function is padded else real


def _apart(got: Tensor, want: Tensor, affine: Affine | None = None) -> float:
    """The largest difference, in parts of the largest value that is wanted; of bytes, what they are off the nearest."""
    if got.shape != want.shape:
        return torch.inf
    if affine:
        real = (want * (1 / affine.scale) + affine.zero_point).clamp(0, 2**affine.bits - 1)
        difference = ((got - real).abs() - 0.5).clamp_min(0) * affine.scale
    elif want.is_floating_point() or want.is_complex():
        same = (got == want) | (got.isnan() & want.isnan())
        difference = (got - want).abs().masked_fill(same, 0)
    else:
        return 0.0 if torch.equal(got, want) else torch.inf
    if not bool(difference.any()):
        return 0.0
    largest = float(want[want.isfinite()].abs().max()) if bool(want.isfinite().any()) else 0.0
    return float(difference.nan_to_num(torch.inf).max()) / max(largest, torch.finfo(torch.float32).tiny)


def _equal(got: Tensor, want: Tensor, affine: Affine | None) -> Tensor:
    """What is wanted, as `got` lies in memory."""
    if affine:
        return torch.empty_like(got).copy_(affine.centred(want).add_(affine.zero_point))
    return got if torch.equal(got, want) else torch.empty_like(got).copy_(want)


def _parts(value: Any) -> list[Tensor]:
    return [each for each in ([value] if isinstance(value, Tensor) else value) if isinstance(each, Tensor)]


def _next(values: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(values)


def _is_blank(step: Step) -> bool:
    """Whether the step only takes memory, and what is in it means nothing."""
    return "empty" in str(step.function)
