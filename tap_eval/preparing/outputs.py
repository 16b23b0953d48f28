"""The logits among what a network returns: a tensor, or one in a dict, a tuple or a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tap_eval.mistake import NetworkMistake

_DEPTH = 3
_NAMED = "logits"


@dataclass(frozen=True)
class Output:
    """Where the logits are, and what shape they have there."""

    place: str
    """names and numbers on the way to the tensor, "" for what is returned itself"""
    form: Literal["classes", "one logit"]
    """(N, C), with any number of axes of 1; or one number an image, whose sign tells two classes apart"""

    def logits(self, returned: Any) -> Tensor:
        """(N, C) float32; one logit z becomes (0, z), which has the same classes and probabilities."""
        for place, tensor in _tensors(returned):
            if place == self.place:
                flat = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
                return flat if self.form == "classes" else torch.cat([torch.zeros_like(flat), flat], dim=1)
        raise NetworkMistake(
            f"the network returned {_told(returned)} and nothing at '{self.place}', as it did before: it has to "
            "return the same for all images."
        )


def find_output(returned: Any, images: int, classes: int | None, key: str | None) -> Output:
    """Where the logits are in what a network returned for so many `images`, of so many `classes` if that is known.

    `key` is the name that the user gave. Raises `NetworkMistake` when there are none, or several.
    """
    fitting = {place: tensor for place, tensor in _tensors(returned) if _width(tensor, images)}
    if key is not None:
        if key not in fitting:
            raise NetworkMistake(
                f"--output {key}: the network returns {_told(returned)}; "
                + (f"take one of {', '.join(map(str, fitting))}." if fitting else "(N, classes) is needed.")
            )
        return _output(key, fitting[key], images, classes)
    if not fitting:
        raise NetworkMistake(
            f"the network returns {_told(returned)} for {images} images: a tensor of logits, (N, classes), is needed, "
            "alone or in a dict, a tuple or a dataclass."
        )
    for chosen in (
        list(fitting),
        [place for place in fitting if place.rpartition(".")[2] == _NAMED],
        [place for place, tensor in fitting.items() if _width(tensor, images) == classes],
    ):
        if len(chosen) == 1:
            return _output(chosen[0], fitting[chosen[0]], images, classes)
    raise NetworkMistake(
        f"the network returns {_told(returned)}: say which are the logits with --output, one of {', '.join(fitting)}."
    )


def _output(place: str, tensor: Tensor, images: int, classes: int | None) -> Output:
    one = _width(tensor, images) == 1 and classes in (None, 2)
    return Output(place, "one logit" if one else "classes")


def _width(tensor: Tensor, images: int) -> int:
    """The number of classes that a tensor tells apart, or 0 of one that is not logits."""
    shape = tensor.shape
    fits = (
        tensor.dtype.is_floating_point and len(shape) > 0 and shape[0] == images and not any(n != 1 for n in shape[2:])
    )
    return (shape[1] if len(shape) > 1 else 1) if fits else 0


def _tensors(value: Any, place: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield place, value
    elif depth:
        for name, each in _parts(value).items():
            yield from _tensors(each, f"{place}.{name}" if place else str(name), depth - 1)


def _parts(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple):
        fields: Any = getattr(value, "_fields", range(len(value)))
        return dict(zip(fields, value, strict=True))
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {}


def _told(returned: Any) -> str:
    found = [f"{place or 'a tensor'} {tuple(tensor.shape)}" for place, tensor in _tensors(returned)]
    kind = type(returned).__name__
    return found[0] if isinstance(returned, Tensor) else f"a {kind} of {', '.join(found[:8]) or 'no tensor'}"
