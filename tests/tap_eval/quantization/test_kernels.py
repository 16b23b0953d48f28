"""Arithmetic on bytes gives the nearest bytes, with PyTorch's quantized tensors and without."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tap_eval.quantization import kernels
from tap_eval.quantization.quantizer import Affine


def lent(lends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's quantized tensors, where it still has them, or without."""
    if lends and not kernels._lends():
        pytest.skip("this build of PyTorch has no quantized tensors")
    monkeypatch.setattr(kernels, "_lends", lambda: lends)


def test_a_shortcut_is_padded_with_the_byte_of_zero_and_keeps_its_layout() -> None:
    x = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8).to(memory_format=torch.channels_last)
    for widths in ([0, 0, 0, 0, 1, 2], [1, 2, 3, 4], [2, 0, 0, 1, 0, 0, 1, 0], [-1, 2], [0, 0]):
        got = kernels.padded(x[:, :, ::2], widths, 9)
        assert torch.equal(got, F.pad(x[:, :, ::2], widths, value=9))
    assert kernels.padded(x, [0, 0, 0, 0, 1, 2], 9).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("lends", [True, False], ids=["quantized tensors", "without"])
def test_bytes_are_the_nearest_to_what_they_stand_for(lends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lent(lends, monkeypatch)
    every = torch.arange(256, dtype=torch.uint8)
    x, other = (each.contiguous() for each in torch.meshgrid(every, every, indexing="ij"))
    of, of_other, to = Affine(0.013, 200, 8), Affine(0.05, 0, 8), Affine(0.021, 31, 8)
    real, real_other = (x.double() - 200) * 0.013, other.double() * 0.05
    few = Affine(0.9, 3, 4)
    for got, expected, integers in (
        (kernels.added(x, other, of, of_other, to), real + real_other, to),
        (kernels.converted(x, of, to), real, to),
        (kernels.converted(x, of, few), real, few),
        (kernels.joined([x, other], 1, of=[of, of_other], to=to), torch.cat([real, real_other], 1), to),
        (
            kernels.averaged(x, [0], True, function=torch.ops.aten.mean.dim, of=of, to=to),
            real.mean(0, keepdim=True),
            to,
        ),
    ):
        assert got.dtype is torch.uint8
        wanted = (expected / integers.scale + integers.zero_point).clamp(0, 2**integers.bits - 1)
        assert float((got.double() - wanted).abs().max()) < 0.501
    assert torch.allclose(kernels.floats_of(x, of).double(), real, atol=1e-6)


@pytest.mark.parametrize("lends", [True, False], ids=["quantized tensors", "without"])
@pytest.mark.parametrize("zero_point", [0, 127, 128])
def test_numbers_between_two_bytes_fall_as_on_the_simulated_path(
    zero_point: int, lends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all pixels do that are made symmetrical by a mean and a standard deviation of 0.5."""
    lent(lends, monkeypatch)
    affine = Affine(0.25, zero_point, 8)
    x = torch.arange(-600, 600).reshape(20, 60) / 8

    assert torch.equal(kernels.bytes_of(x, affine).float(), affine.centred(x) + zero_point)


POOLINGS: dict[str, tuple[tuple[object, ...], int]] = {
    "overlapping": (([3, 3], [2, 2], [1, 1]), 64),
    "few channels": (([3, 3], [2, 2], [1, 1]), 24),
    "no stride given": (([2, 3],), 24),
    "numbers for lists": ((3, 1, 1), 24),
    "dilated": (([3, 2], [1, 2], [1, 0], [2, 1]), 24),
    "to the edge": (([3, 3], [2, 2], [0, 0], [1, 1], True), 24),
}


@pytest.mark.parametrize("lends", [True, False], ids=["quantized tensors", "without"])
@pytest.mark.parametrize("case", POOLINGS)
def test_the_largest_byte_is_found_wherever_it_is(case: str, lends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lent(lends, monkeypatch)
    given, channels = POOLINGS[case]
    x = torch.randint(0, 256, (2, channels, 14, 11), dtype=torch.uint8).to(memory_format=torch.channels_last)
    got = kernels.largest(x, *given)
    assert got.dtype is torch.uint8
    assert torch.equal(got.double(), F.max_pool2d(x.double(), *given))  # type: ignore[arg-type]
