"""The devices that networks are measured on: their names, and what each of them can do.

Here alone a kind of device is named; everything else is given a `torch.device`, and asks here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tap_eval.mistake import Mistake

CPU = torch.device("cpu")
NAMES = r"auto|cpu|cuda(:\d+)?|mps"
"""what a device may be called, as a regular expression"""
_TENSOR_CORES = (8, 0)
"""the compute capability from which CUDA devices multiply in TF32"""
_LAUNCHING = threading.RLock()
Form = tuple[torch.Size, tuple[int, ...]]
"""A tensor's shape and strides."""
_Record = TypeVar("_Record", bound=Any)


class DeviceMistake(Mistake):
    """A device that this machine does not have, or that a network does not run on."""

    kind = "device"


def found() -> tuple[torch.device, ...]:
    """The devices of this machine."""
    cuda = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return (*cuda, *([torch.device("mps")] if torch.backends.mps.is_available() else []), CPU)


def chosen(name: str, among: Sequence[torch.device]) -> tuple[torch.device, ...]:
    """The devices that `name`, one of `NAMES`, means; a network is then to be on each of them.

    `auto` is all CUDA devices, or the CPU where there is none; `cuda` is all of them too. Raises `DeviceMistake`.
    """
    kind, _, index = name.partition(":")
    wanted = [each for each in among if each.type == ("cuda" if name == "auto" else kind)]
    if index:
        wanted = [each for each in wanted if each.index == int(index)]
    if wanted:
        return tuple(wanted)
    if name == "auto":
        return (CPU,)
    there = ", ".join(map(str, among))
    raise DeviceMistake(
        f"--device {name}: this machine, with the PyTorch that is installed, has {there}: give one of these, or auto."
    )


def called(device: torch.device) -> str:
    """With the name of its make and its memory, as far as they are known."""
    if device.type != "cuda":
        return str(device)
    its = torch.cuda.get_device_properties(device)
    return f"{device} ({its.name}, {its.total_memory / 2**30:.0f} GiB)"


def key_of(device: torch.device) -> list[str]:
    """What names it in the key of a result: nothing for the CPU, else its kind, whose floats have other last bits."""
    return [] if device == CPU else [device.type]


def widest(device: torch.device) -> torch.dtype:
    """The floats with the most digits that it has."""
    return torch.float32 if device.type == "mps" else torch.float64


def on(record: _Record, device: torch.device) -> _Record:
    """A dataclass with its tensors on `device`."""
    tensors = {name: value.to(device) for name, value in vars(record).items() if isinstance(value, Tensor)}
    return replace(record, **tensors)


def out_of_memory(error: Exception) -> bool:
    """Whether a device, or the CPU, had too little memory for what was asked of it."""
    told = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in told)


def alone(device: torch.device) -> AbstractContextManager[Any]:
    """Held while work is given to `device`, and not while it is waited for.

    On CUDA devices the precision of products is one setting for all threads, which `multiply_whole` changes for one
    product at a time.
    """
    return _LAUNCHING if device.type == "cuda" else nullcontext()


def in_float32(device: torch.device) -> None:
    """Has all products on `device` computed in float32, and none of them in TF32, as PyTorch has convolutions."""
    if device.type == "cuda":
        _allow_tf32((False, False))


def multiply_whole(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, tried: dict[Form, bool]
) -> Tensor:
    """`product(x, weight)` of whole numbers within +-255 and +-127 in float32, on tensor cores where it is the same.

    TF32 has 11 significant bits, so whole numbers up to 2^11 are exact in it, and so are products of two of them,
    which are added in float32: sums are exact up to 2^24, as they are without. But a library may reach a product by
    sums and quotients of its operands (Winograd's convolutions), which are rounded. So for each form of `x` whole
    numbers of the full range are multiplied both ways first, and `tried` holds whether they gave the same.
    """
    if not _has_tensor_cores(x.device):
        return product(x, weight)
    form = x.shape, x.stride()
    if form not in tried:
        tried[form] = same_in_tf32(product, x, weight)
    with tf32() if tried[form] else nullcontext():
        return product(x, weight)


def _has_tensor_cores(device: torch.device) -> bool:
    capable = device.type == "cuda" and torch.cuda.is_available()
    return capable and torch.cuda.get_device_capability(device) >= _TENSOR_CORES


def same_in_tf32(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> bool:
    """Whether a product of whole numbers in the place of `x` and `weight` is the same in TF32.

    Random signs keep the sums below 2^24, so that the nearest whole numbers are what is right.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    some, other = (
        torch.empty_like(tensor).random_(-most, most + 1, generator=generator)
        for tensor, most in ((x, 255), (weight, 127))
    )
    with tf32(False):
        expected = product(some, other).round_()
    with tf32():
        return torch.equal(product(some, other), expected)


def _allow_tf32(allowed: tuple[bool, bool]) -> None:
    """For products of matrices, and for convolutions."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def tf32(allowed: bool = True) -> Iterator[None]:
    """Products in TF32, or not, for a thread that is `alone`."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    _allow_tf32((allowed, allowed))
    try:
        yield
    finally:
        _allow_tf32(before)
