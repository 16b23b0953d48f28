"""Whether a prepared network computes what the network computes that the user gave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.copying import copy_of, in_eval_mode, unwrapped
from tap_eval.preparing.fusion import fused
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.products import Product
from tap_eval.preparing.torchscript import readable
from tap_eval.preparing.tracing import Call, Norm, Source, Tracing

TOLERANCE = 1e-4
"""of the largest logit: more may be what float32 rounds, and is looked at in float64"""
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Original:
    """The user's network, copied, in eval mode and float32."""

    network: nn.Module
    name: str
    half: bool
    """whether it was given in half precision"""
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(network: nn.Module, example: Tensor) -> Original:
        """From what the user gave, of which it takes a copy: without wrappers, TorchScript read, branches fused.

        `example` is a batch of images, (N, C, H, W). Raises `NetworkMistake` for what cannot be read or fused.
        """
        network = readable(unwrapped(network))
        kinds = {tensor.dtype for tensor in network.parameters() if tensor.dtype.is_floating_point} - {torch.float32}
        copied, name = in_eval_mode(copy_of(network)), type(network).__name__
        copied.requires_grad_(False)
        half = not kinds.isdisjoint(_HALF) or (bool(kinds) and not Original(copied, name, False)._runs(example))
        notes = [f"its weights are {_listed(kinds)}, and become float32"] if half else []
        held = itertools.chain(network.parameters(), network.buffers())
        others = {tensor.dtype for tensor in held if tensor.dtype.is_floating_point} - {torch.float32}
        if others and not half and Original(single := copy_of(copied).float(), name, False)._runs(example):
            copied = single  # as which sizes count
            notes = [f"some of its tensors are {_listed(others)}, and become float32"]
        original = Original(copied.float() if half else copied, name, half, tuple(notes))
        original.run(example)
        if not half:
            with _InFloat({}) as watching:
                copied(example)
            if watching.met_half:
                notes.append("its code computes in half precision here and there, which becomes float32")
                original = replace(original, half=True)
        try:
            with _InFloat({}) if original.half else nullcontext():
                deployed = fused(original.network, example)
        except NetworkMistake as mistake:  # it runs all the same
            deployed = None
            notes.append(f"it is measured as it is, though {mistake}")
        if deployed:
            notes.append("its branches are fused by its own methods, as it is deployed")
        network = (deployed or original.network).requires_grad_(False)
        return replace(original, network=network, notes=tuple(notes))

    def in_float64(self) -> Original:
        """A copy that computes in float64, as far as its code lets it."""
        return replace(self, network=copy_of(self.network).double())

    def run(self, pixels: Tensor) -> Any:
        """What the network returns for (N, C, H, W); raises `NetworkMistake` with what its code raised."""
        try:
            if self.half:
                with _InFloat({}):
                    return self.network(pixels)
            return self.network(pixels)
        except NetworkMistake:
            raise
        except Exception as error:  # the network's code is the user's: whatever it raises is theirs to see
            raise NetworkMistake(f"{self.name} {self._told(pixels, error)}") from error

    def _runs(self, pixels: Tensor) -> bool:
        try:
            self.run(pixels)
        except NetworkMistake:
            return False
        return True

    def _told(self, pixels: Tensor, error: Exception) -> str:
        """Why it does not run on these images, and what to give instead."""
        if pixels.shape[1] == 3:
            with suppress(Exception):  # it was only a guess
                self.network(pixels[:, :1])
                return "takes images of 1 channel, and these have 3: give grey ones with --transform channels=1."
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return (
            f"does not run on images of shape {tuple(pixels.shape)} ({said}); give images of its size and channels "
            "with --transform."
        )


class _InFloat(Tracing):
    """Runs as it is, but in float32 where the network's code asks for half precision."""

    def on_product(self, key: str, source: Source, product: Product, call: Call) -> Any:
        return call()

    def on_norm(self, norm: Norm, call: Call) -> Any:
        return call()

    def on_other(self, call: Call) -> Any:
        return call()


def _listed(kinds: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def difference(original: Original, prepared: Prepared, pixels: Tensor, expected: Tensor) -> str | None:
    """Where the two differ first on these images, (N, C, H, W): the name of a module; None where they agree.

    `expected` are the original's logits.
    """
    return None if _close(prepared(pixels), expected, TOLERANCE) else _first_difference(original, prepared, pixels)


def agree(original: Original, prepared: Prepared, batches: Sequence[Tensor]) -> bool:
    """Whether both give the same logits for all these images; False too where the network's code does not run on them.

    Of a network in float64, whose layers were found in float64, it tells whether a difference in float32 is rounding.
    """
    try:
        return all(_close(prepared(each), prepared.output.logits(original.run(each)), TOLERANCE) for each in batches)
    except Exception:  # noqa: BLE001 a step takes float32 alone: whatever the network's code raises then
        return False


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not bool(expected.isfinite().all()):
        raise NetworkMistake("the network's outputs are NaN or infinite for some images: give weights that work.")
    return torch.allclose(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def _first_difference(original: Original, prepared: Prepared, pixels: Tensor) -> str:
    """The first module whose output differs; those are left out whose norm has moved into them."""
    moved = {prepared.layers[index].name for index in prepared.folded}
    with _watched(original.network, moved) as expected:
        original.run(pixels)
    with _watched(prepared.network, moved) as got:
        prepared(pixels)
    for (name, sample), (_, other) in zip(expected, got, strict=False):
        if sample.shape != other.shape or not _close(other, sample, TOLERANCE):
            return name
    return "its output"


_SAMPLE = 4096


@contextmanager
def _watched(network: nn.Module, but: set[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """Samples of what each module returned, in order."""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                flat = output.detach().flatten()
                seen.append((name, flat[:: max(len(flat) // _SAMPLE, 1)].clone()))

        return see

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in network.named_modules()
        if name and name not in but
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
