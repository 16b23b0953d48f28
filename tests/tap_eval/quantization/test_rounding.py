"""GPTQ is the paper's, and never worse than the nearest on images that were left out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.calibration import groups_of
from tap_eval.quantization.factor import DAMPINGS, Factor
from tap_eval.quantization.gptq import gptq, searched, thinning, ungrouped
from tap_eval.quantization.moments import Few, Moments, Sums
from tap_eval.quantization.rounding import Rounded, error, grouped, nearest

LAYERS = {
    "linear": lambda: nn.Linear(150, 12),
    "conv": lambda: nn.Conv2d(8, 12, 3),
    "grouped": lambda: nn.Conv2d(12, 6, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(12, 12, 3, groups=12),
}


def layer_of(kind: str) -> Quantizable:
    torch.manual_seed(0)
    return LAYERS[kind]()


def inputs_of(layer: Quantizable, count: int, seed: int) -> Tensor:
    """Inputs with a mean, whose channels and neighbours have much in common."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Linear):
        mixed = torch.randn(40, layer.in_features, generator=torch.Generator().manual_seed(99)) / 40**0.5
        noise = torch.randn(count, layer.in_features, generator=generator)
        return (torch.randn(count, 40, generator=generator) @ mixed + 0.2 * noise).relu()
    x = torch.randn(count, layer.in_channels, 9, 9, generator=generator)
    return (nn.functional.avg_pool2d(x, 3, 1, 1) + 0.5 * x.mean(1, keepdim=True) + 0.1).relu()


def moments_of(layer: Quantizable, x: Tensor, block: int | None = None) -> Moments:
    sums = Sums(layer, block or layer.weight[0].numel())
    sums.take(x)
    moments = sums.moments()
    assert isinstance(moments, Moments)
    return moments


def few_of(layer: Quantizable, x: Tensor, block: int | None = None) -> Few:
    """The same, its positions counted as few."""
    sums = Sums(layer, block or layer.weight[0].numel(), positions=1)
    sums.take(x)
    moments = sums.moments()
    assert isinstance(moments, Few)
    return moments


def fitted_to_all(weight: Tensor, moments: Moments, bits: Sequence[int]) -> list[Rounded]:
    """By GPTQ, with no image left out."""
    found = [each for each in gptq(weight, moments, None, bits) if each is not None]
    assert len(found) == len(bits)
    return [rounded for rounded, _ in found]


def by_the_paper(layer: Quantizable, moments: Tensor, scale: Tensor, bits: int, damping: float) -> Tensor:
    """Integers (O, I): one column after the other, each then eliminated from the inverse, in float64."""
    groups, (_, _, size, _) = groups_of(layer), moments.shape
    top, found = 2 ** (bits - 1) - 1, []
    for rows, steps, each in zip(
        layer.weight.double().view(groups, -1, size),
        scale.double().view(groups, -1),
        moments[:, 0].double(),
        strict=True,
    ):
        order = each.diagonal().argsort(descending=True).tolist()
        inverse = torch.linalg.inv(each + damping * each.diagonal().mean() * torch.eye(size))
        rows, whole = rows.clone(), torch.zeros_like(rows)
        for place, column in enumerate(order):
            whole[:, column] = (rows[:, column] / steps).round().clamp(-top, top)
            off = (rows[:, column] - whole[:, column] * steps) / inverse[column, column]
            behind = order[place + 1 :]
            rows[:, behind] -= off[:, None] * inverse[column, behind]
            inverse -= inverse[:, [column]] @ inverse[[column]] / inverse[column, column]
        found.append(whole)
    return torch.cat(found)


def gone_over(
    layer: Quantizable, moments: Tensor, integers: Tensor, scale: Tensor, bits: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Integers (O, I) and scales after two passes that try every integer of a column, given all others, in float64."""
    groups, size, levels = groups_of(layer), moments.shape[3], range(1 - 2 ** (bits - 1), 2 ** (bits - 1))
    found, steps = integers.double().view(groups, -1, size), scale.double().view(groups, -1)
    weight, around = layer.weight.double().view(groups, -1, size), moments[:, 0].double()
    mean = around.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1) * torch.eye(size)
    damped, lightly = around + damping * mean, around + DAMPINGS[0] * mean

    def fitted() -> Tensor:
        return (found @ lightly * weight).sum(2) / (found @ lightly * found).sum(2)

    steps = fitted()
    for _ in range(2):
        for column in range(size):
            tried = []
            for level in levels:
                found[:, :, column] = level
                off = found * steps.unsqueeze(2) - weight
                tried.append((off @ damped * off).sum(2))
            found[:, :, column] = torch.stack(tried).argmin(0).double() + levels[0]
        steps = fitted()
    return found.view(len(layer.weight), -1), steps.flatten()


def same(integers: Tensor, others: Tensor) -> Tensor:
    """Of which rows all integers are the same: halves may fall otherwise in float32, and all behind them with them."""
    return (integers == others).all(1)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_gptq_is_that_of_the_paper_and_is_gone_over(kind: str) -> None:
    layer = layer_of(kind)
    moments = moments_of(layer, inputs_of(layer, 400, 1))
    rows, factor = grouped(layer.weight, moments), Factor.of(moments, DAMPINGS[1])
    for bits in (2, 3, 4):
        scale, tops = nearest(layer.weight, bits).scale, torch.full(rows.shape[:3:2], 2.0 ** (bits - 1) - 1)
        integers = factor.integers(rows, scale.view(tops.shape), tops)
        expected = by_the_paper(layer, moments.matrix, scale, bits, DAMPINGS[1])
        assert same(integers.flatten(0, 2).double(), expected).float().mean() > 0.9
        rounded = ungrouped(*factor.rounded(rows, scale.view(tops.shape), tops), layer.weight)
        whole, steps = gone_over(layer, moments.matrix, integers, scale, bits, DAMPINGS[1])
        assert rounded.integers.shape == layer.weight.shape
        assert rounded.integers.is_contiguous()
        rows_alike = same(rounded.integers.flatten(1).double(), whole)
        assert rows_alike.float().mean() > 0.9
        assert torch.allclose(rounded.scale.double()[rows_alike], steps[rows_alike], rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_gptq_is_less_off_than_the_nearest_on_images_that_it_has_not_seen(kind: str) -> None:
    layer = layer_of(kind)
    fit, held = (moments_of(layer, inputs_of(layer, count, seed)) for count, seed in ((300, 1), (100, 2)))
    unseen = moments_of(layer, inputs_of(layer, 400, 3))
    for bits, found in zip((2, 3, 4), gptq(layer.weight, fit, held, (2, 3, 4)), strict=True):
        assert found is not None
        rounded, _ = found
        plain = nearest(layer.weight, bits)
        assert error(layer.weight, rounded, unseen) < error(layer.weight, plain, unseen)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("parts", [1, 2])
def test_few_positions_are_rounded_as_by_their_moments(kind: str, parts: int) -> None:
    layer, damping = layer_of(kind), torch.full((groups_of(layer_of(kind)), 1, 1), DAMPINGS[1])
    block = -(-layer.weight[0].numel() // parts)
    many, few = (
        of(layer, inputs_of(layer, 2, 1), block) + of(layer, inputs_of(layer, 3, 2), block)
        for of in (moments_of, few_of)
    )
    assert torch.allclose(few.inputs @ few.inputs.mT, many.matrix, atol=1e-5)
    assert torch.allclose(few.mean, many.mean, atol=1e-5)
    weight = layer.weight + 0
    assert error(weight, nearest(weight, 3), few) == pytest.approx(error(weight, nearest(weight, 3), many), rel=1e-4)
    rows = grouped(weight, many)
    tops = torch.full((groups_of(layer), rows.shape[2]), 3.0)
    (scale,) = searched(rows, many, [tops])
    assert torch.allclose(searched(rows, few, [tops])[0], scale, rtol=1e-3)
    missing = torch.randn(*rows.shape[:3], few.inputs.shape[3], generator=torch.Generator().manual_seed(0)) / 10
    moved = Factor.of(many, damping).moved(rows, missing @ few.inputs.mT)
    assert torch.allclose(Factor.of(few, damping).moved(rows, missing), moved, atol=1e-3)
    (expected, steps), (got, its) = (Factor.of(each, damping).rounded(moved, scale, tops) for each in (many, few))
    alike = (expected == got).all(3).all(1)
    assert alike.float().mean() > 0.8
    assert torch.allclose(its[alike], steps[alike], rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("count", [20, 60, 300])
def test_the_damping_is_that_with_which_gptq_is_least_off_on_images_left_out(count: int) -> None:
    layer = layer_of("linear")
    fit, held = (moments_of(layer, inputs_of(layer, each, seed)) for each, seed in ((count, 1), (100, 2)))
    rows, top = grouped(layer.weight, fit), torch.full((1, len(layer.weight)), 7.0)
    (begun,) = searched(rows, fit + held, [top])

    def off(damping: float) -> float:
        integers, scale = Factor.of(fit, damping).rounded(rows, begun, top, passes=0)
        return error(layer.weight, Rounded(integers.view_as(layer.weight), scale.flatten()), held)

    (found,) = gptq(layer.weight, fit, held, [4])
    assert found is not None
    assert found[1] == min(DAMPINGS, key=off)


@torch.no_grad()
def test_a_layer_of_many_channels_is_judged_by_some_of_them_and_rounded_whole() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(150, 300)
    assert thinning(layer.weight, 1) > 1
    fit, held = (moments_of(layer, inputs_of(layer, count, seed)) for count, seed in ((300, 1), (100, 2)))
    unseen = moments_of(layer, inputs_of(layer, 400, 3))
    (found,) = gptq(layer.weight, fit, held, [3])
    assert found is not None
    rounded, damping = found
    top = torch.full((1, 300), 3.0)
    rows, whole = grouped(layer.weight, fit), fit + held
    (begun,) = searched(rows, whole, [top])
    integers, _ = Factor.of(whole, damping).rounded(rows, begun, top)
    assert torch.equal(rounded.integers, integers.view_as(layer.weight).to(torch.int8))
    assert error(layer.weight, rounded, unseen) < error(layer.weight, nearest(layer.weight, 3), unseen)


@torch.no_grad()
def test_bits_that_are_rounded_together_are_those_of_each_alone() -> None:
    layer = layer_of("grouped")
    fit, held = (moments_of(layer, inputs_of(layer, 40, seed)) for seed in (1, 2))
    for bits, together in zip((2, 3, 4, 8), gptq(layer.weight, fit, held, (2, 3, 4, 8)), strict=True):
        (alone,) = gptq(layer.weight, fit, held, [bits])
        assert together is not None
        assert alone is not None
        assert together[1] == alone[1]
        assert torch.equal(together[0].integers, alone[0].integers)
        assert torch.allclose(together[0].scale, alone[0].scale, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "bits"), [("linear", 2), ("grouped", 3), ("conv", 4)])
def test_no_share_of_the_peak_is_a_much_better_scale_than_that_chosen(kind: str, bits: int) -> None:
    layer = layer_of(kind)
    moments = moments_of(layer, inputs_of(layer, 400, 1))
    rows, top = grouped(layer.weight, moments), 2 ** (bits - 1) - 1
    (rounded,) = fitted_to_all(layer.weight, moments, [bits])
    inverse, tops = Factor.of(moments, DAMPINGS[0]), torch.full((len(rows), rows.shape[2]), float(top))

    def by(share: float) -> float:
        scale = share * rows.abs().amax((1, 3)) / top
        integers = inverse.integers(rows, scale, tops).view_as(layer.weight)
        return error(layer.weight, Rounded(integers, scale.flatten()), moments)

    least = min(by(share) for share in torch.linspace(0.3, 1.1, 9).tolist())
    assert error(layer.weight, rounded, moments) < 1.2 * least


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "depthwise"])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_too_few_images_to_know_a_layer_make_it_no_worse_on_those_left_out(kind: str, count: int) -> None:
    layer = layer_of(kind)
    fit, held = (
        moments_of(layer, inputs_of(layer, each, seed)) for each, seed in ((count, 1), (max(count // 4, 2), 2))
    )
    for bits, found in zip((2, 3, 4, 8), gptq(layer.weight, fit, held, (2, 3, 4, 8)), strict=True):
        least = error(layer.weight, nearest(layer.weight, bits), held)
        assert found is None or error(layer.weight, found[0], held) <= least


@torch.no_grad()
def test_images_that_say_the_contrary_of_those_left_out_give_nothing() -> None:
    layer, generator = layer_of("linear"), torch.Generator().manual_seed(0)
    half, noise = (torch.randn(400, 75, generator=generator) for _ in range(2))
    fit, held = (moments_of(layer, torch.cat([half, sign * half + 0.1 * noise], 1)) for sign in (1, -1))
    assert gptq(layer.weight, fit, held, (2, 3, 4, 8)) == [None] * 4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conv", "grouped"])
def test_inputs_in_blocks_are_rounded_better_than_to_the_nearest_too(kind: str) -> None:
    layer = layer_of(kind)
    inputs = layer.weight[0].numel()
    block = inputs // 4 + 1
    assert inputs % block
    fit, held = (moments_of(layer, inputs_of(layer, count, seed), block) for count, seed in ((400, 1), (100, 2)))
    assert fit.matrix.shape == (groups_of(layer), 4, block, block)
    unseen = moments_of(layer, inputs_of(layer, 100, 3))
    for bits, found in zip((2, 3, 4, 8), gptq(layer.weight, fit, held, (2, 3, 4, 8)), strict=True):
        assert found is not None
        rounded, _ = found
        assert rounded.integers.shape == layer.weight.shape
        assert rounded.integers.abs().max() <= 2 ** (bits - 1) - 1
        assert error(layer.weight, rounded, unseen) < error(layer.weight, nearest(layer.weight, bits), unseen)


@torch.no_grad()
def test_inputs_and_channels_that_are_always_zero_do_no_harm() -> None:
    layer = layer_of("linear")
    layer.weight[3] = 0
    x = inputs_of(layer, 100, 1)
    x[:, :20] = 0
    for rounded in fitted_to_all(layer.weight, moments_of(layer, x), (2, 8)):
        assert not rounded.integers[3].any()
        assert bool(rounded.scale.isfinite().all())
    (silent,) = fitted_to_all(layer.weight, moments_of(layer, torch.zeros(9, 150)), [4])
    assert bool(silent.scale.isfinite().all())
    assert float((silent.real() - layer.weight).abs().max()) < 0.1


def test_channels_that_calibration_images_never_wake_are_rounded_too() -> None:
    layer = layer_of("depthwise")
    x = inputs_of(layer, 4, 1)
    x[:, 3] = 0
    x[:, 5] = 1e-7 * x[:, 5] + 3  # of which float32 loses all but the mean
    moments = moments_of(layer, x)
    for found in gptq(layer.weight, moments, moments_of(layer, x[:2]), (2, 4)):
        assert found is not None
        assert bool(found[0].scale.isfinite().all())
    assert all(bool(each.isfinite().all()) for each in Factor.of(moments, DAMPINGS[0]).near)


@torch.no_grad()
@pytest.mark.parametrize("strength", [0, 1e-7, 1e-4])
def test_a_group_that_hardly_wakes_is_damped_by_what_it_sees_itself(strength: float) -> None:
    layer = layer_of("depthwise")
    x = inputs_of(layer, 4, 1)
    x[:, 3] *= strength
    x[:, 5] = x[:, 5] * strength + 3
    moments = moments_of(layer, x)
    (near,) = Factor.of(moments, DAMPINGS[0]).near
    for group, its in enumerate(near):
        alone = Moments(moments.matrix[group : group + 1], moments.mean[group : group + 1], moments.count)
        (mine,) = Factor.of(alone, DAMPINGS[0]).near
        assert torch.allclose(mine, its, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("positions", [1, 2, 3])
def test_what_is_seen_at_a_few_positions_alone_is_rounded_as_well_as_to_the_nearest(positions: int) -> None:
    layer = layer_of("linear")
    (rounded,) = fitted_to_all(layer.weight, moments_of(layer, inputs_of(layer, positions, 1)), [8])
    assert squared(rounded, layer.weight) < 3 * squared(nearest(layer.weight, 8), layer.weight)


@torch.no_grad()
@pytest.mark.parametrize("strength", [0, 1e-5, 3e-5, 1e-3])
def test_channels_that_read_inputs_which_hardly_wake_keep_weights_near_their_own(strength: float) -> None:
    layer = layer_of("linear")
    layer.weight[:4, 30:] = 0
    x = torch.randn(400, 150, generator=torch.Generator().manual_seed(0))
    x[:, :30] *= strength
    for bits, rounded in zip((4, 8), fitted_to_all(layer.weight, moments_of(layer, x), (4, 8)), strict=True):
        mine, plain = (Rounded(each.integers[:4], each.scale[:4]) for each in (rounded, nearest(layer.weight, bits)))
        assert squared(mine, layer.weight[:4]) < 3 * squared(plain, layer.weight[:4])


def squared(rounded: Rounded, weight: Tensor) -> float:
    """What all weights are off, squared."""
    return float((rounded.real() - weight).square().sum())
