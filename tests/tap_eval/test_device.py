"""Devices by name, and what is exact on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tap_eval.device import (
    CPU,
    DeviceMistake,
    Form,
    chosen,
    found,
    in_float32,
    key_of,
    multiply_whole,
    out_of_memory,
    same_in_tf32,
    tf32,
)
from tests.tap_eval.fake import CUDA, NEEDS_CUDA

MPS = torch.device("mps")
TWO = (CUDA, torch.device("cuda", 1))


@pytest.mark.parametrize(
    ("name", "among", "expected"),
    [
        ("auto", (*TWO, CPU), TWO),
        ("auto", (MPS, CPU), (CPU,)),
        ("cuda", (*TWO, CPU), TWO),
        ("cuda:1", (*TWO, CPU), TWO[1:]),
        ("cpu", (*TWO, CPU), (CPU,)),
        ("mps", (MPS, CPU), (MPS,)),
    ],
)
def test_a_name_means_devices(name: str, among: tuple[torch.device, ...], expected: tuple[torch.device, ...]) -> None:
    assert chosen(name, among) == expected


@pytest.mark.parametrize(
    ("name", "among", "there"),
    [("cuda:3", (*TWO, CPU), "cuda:0, cuda:1, cpu"), ("cuda", (CPU,), "cpu"), ("mps", (CPU,), "cpu")],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    name: str, among: tuple[torch.device, ...], there: str
) -> None:
    with pytest.raises(DeviceMistake, match=rf"^--device {name}: .* has {there}: give one of these, or auto\.$"):
        chosen(name, among)


def test_the_cpu_is_always_there_and_adds_nothing_to_keys() -> None:
    assert found()[-1] == CPU
    assert key_of(CPU) == []
    assert key_of(CUDA) == key_of(TWO[1]) == ["cuda"] != key_of(MPS)


def test_too_little_memory_is_told_from_other_failures() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(10**15)
    assert out_of_memory(failed.value)
    with pytest.raises(RuntimeError) as failed:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(failed.value)


def test_tf32_is_allowed_within_a_product_alone() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        in_float32(CUDA)
        with tf32():
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("off", [0.0, 0.25])
def test_tensor_cores_are_trusted_where_whole_numbers_come_out_the_same(off: float) -> None:
    seen: list[Tensor] = []

    def product(x: Tensor, weight: Tensor) -> Tensor:
        seen.extend((x, weight))
        return F.linear(x, weight) + off * torch.backends.cuda.matmul.allow_tf32

    assert same_in_tf32(product, torch.rand(64, 512), torch.rand(16, 512)) == (off == 0)
    for tensor, most in zip(seen[:2], (255, 127), strict=True):
        assert torch.equal(tensor, tensor.round())
        assert (tensor.min(), tensor.max()) == (-most, most)


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


@NEEDS_CUDA
@pytest.mark.cuda
@pytest.mark.parametrize(
    ("product", "x", "weight"),
    [
        (F.linear, (64, 512), (256, 512)),
        (convolved, (8, 64, 28, 28), (64, 64, 3, 3)),
        (convolved, (8, 3, 33, 33), (8, 3, 3, 3)),
    ],
)
def test_products_of_whole_numbers_are_whole_numbers_on_a_device(
    product: object, x: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    assert callable(product)
    torch.manual_seed(0)
    some, other = torch.randint(-255, 256, x).float(), torch.randint(-127, 128, weight).float()
    expected = product(some.double(), other.double())
    tried: dict[Form, bool] = {}
    in_float32(CUDA)
    got = multiply_whole(product, some.to(CUDA), other.to(CUDA), tried)
    assert torch.equal(got.cpu().double().round(), expected)
    if any(tried.values()):
        assert torch.equal(got.cpu().double(), expected)
    assert not torch.backends.cudnn.allow_tf32
