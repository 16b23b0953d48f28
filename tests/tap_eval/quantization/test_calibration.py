"""Second moments are those of the unfolded input, however it is padded, cut and counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.products import Quantizable
from tap_eval.quantization.calibration import calibrate, groups_of, mean_patch
from tap_eval.quantization.moments import Few, Moments, Sums, block_of, second_moments

LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "same": lambda: nn.Conv2d(4, 6, (3, 1), padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "strided and dilated": lambda: nn.Conv2d(4, 6, (1, 3), stride=(2, 3), dilation=(1, 2), padding=1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),
    "linear": lambda: nn.Linear(5, 7),
}


def unfolded(layer: Quantizable, x: Tensor) -> Tensor:
    """(G, positions, I) float64: what each weight of a filter is multiplied with, read off by filters of one weight."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, layer.in_features).double()
    inputs = layer.weight[0].numel()
    units = torch.eye(inputs, dtype=torch.float64).view(inputs, *layer.weight.shape[1:])
    found = layer.double()._conv_forward(x.double(), units.repeat(layer.groups, 1, 1, 1), None)
    layer.float()
    return found.view(len(x), layer.groups, inputs, -1).permute(1, 0, 3, 2).reshape(layer.groups, -1, inputs)


def expected(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The second moment about the mean and the mean, of (G, positions, I)."""
    mean = rows.mean(1, keepdim=True)
    return (rows - mean).transpose(1, 2) @ (rows - mean) / rows.shape[1], mean


def images_of(layer: Quantizable, count: int) -> Tensor:
    torch.manual_seed(count)
    return torch.rand(count, 11, 5) if isinstance(layer, nn.Linear) else 5 + torch.rand(count, 4, 8, 9)


def of_many(sums: Sums) -> Moments:
    moments = sums.moments()
    assert isinstance(moments, Moments)
    return moments


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_moments_are_those_of_the_unfolded_input_of_all_calls(kind: str) -> None:
    layer = LAYERS[kind]()
    first, second = images_of(layer, 3), images_of(layer, 2)
    inputs = layer.weight[0].numel()
    sums = Sums(layer, inputs)
    for x in (first, second):
        sums.take(x)
    moments, rows = of_many(sums), unfolded(layer, torch.cat([first, second]))
    matrix, mean = expected(rows)
    assert moments.count == rows.shape[1]
    assert torch.allclose(moments.matrix[:, 0].double(), matrix, atol=1e-4)  # the mean, 5, is large
    assert torch.allclose(moments.mean[:, 0].double(), mean[:, 0], atol=1e-5)
    assert torch.allclose(moments.around_zero()[:, 0].double(), rows.transpose(1, 2) @ rows / rows.shape[1], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("awake", [slice(0, 0), slice(0, 1), slice(11, 12), slice(1, 12)])
@pytest.mark.parametrize("strength", [1e-5, 1.0])
def test_moments_of_a_group_that_is_nearly_always_the_same_are_exact_by_its_own_measure(
    awake: slice, strength: float
) -> None:
    layer = nn.Conv2d(2, 2, 3, groups=2)
    torch.manual_seed(0)
    x = torch.rand(12, 2, 8, 9)
    x[:, 0] = 3 + strength * x[:, 0] * torch.zeros(12, 1, 1).index_fill_(0, torch.arange(12)[awake], 1.0)
    sums = Sums(layer, 9)
    for image in x.split(1):
        sums.take(image)
    matrix, _ = expected(unfolded(layer, x))
    off = (of_many(sums).matrix[:, 0].double() - matrix).abs().amax((1, 2))
    assert bool((off <= 1e-4 * matrix.diagonal(dim1=1, dim2=2).mean(1)).all())


@torch.no_grad()
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("kind", ["plain", "reflect", "strided and dilated", "grouped", "linear"])
def test_what_is_lost_is_what_is_missing_of_the_outputs_by_the_inputs(kind: str, few: bool) -> None:
    layer = LAYERS[kind]()
    x, other = images_of(layer, 3), images_of(layer, 3) ** 2
    sums = Sums(layer, layer.weight[0].numel(), positions=int(few), compared=True)
    sums.take(x, layer(other))
    rows, others = unfolded(layer, x), unfolded(layer, other)
    off = others - rows
    cross = (off - off.mean(1, keepdim=True)).transpose(1, 2) @ (rows - rows.mean(1, keepdim=True)) / rows.shape[1]
    weight = layer.weight.double().view(groups_of(layer), -1, cross.shape[1])
    moments, lost = sums.moments(), sums.lost()[:, 0]
    found = lost @ moments.inputs[:, 0].mT if isinstance(moments, Few) else lost
    assert isinstance(moments, Few) is few
    assert torch.allclose(found.double(), weight @ cross, atol=1e-4)
    assert torch.allclose(mean_patch(layer, x).double().flatten(), rows.mean(1).flatten(), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_of_many_positions_some_are_taken_and_the_outputs_there(kind: str) -> None:
    layer = LAYERS[kind]()
    x, inputs = images_of(layer, 9), layer.weight[0].numel()
    count = unfolded(layer, x).shape[1]
    for every in (2, 5, 7):
        sums = Sums(layer, inputs, positions=every * 4096, compared=True)
        sums.take(x, layer(x))
        assert count / every / 2 < sums.count < 2 * count / every
        assert float(sums.lost().abs().max()) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "grouped", "linear"])
def test_blocks_are_cut_from_the_diagonal_and_filled_with_zeros(kind: str) -> None:
    layer = LAYERS[kind]()
    x, inputs = images_of(layer, 3), layer.weight[0].numel()
    block = block_of(layer, 4 * groups_of(layer) * inputs**2 // 2)
    assert block == -(-inputs // 2)
    whole, cut = (Sums(layer, size) for size in (inputs, block - 1))
    for sums in (whole, cut):
        sums.take(x)
    full, parts = of_many(whole).matrix[:, 0], of_many(cut).matrix
    for place in range(parts.shape[1]):
        start, stop = place * (block - 1), min((place + 1) * (block - 1), inputs)
        rest = parts[:, place].clone()
        assert torch.allclose(rest[:, : stop - start, : stop - start], full[:, start:stop, start:stop], atol=1e-5)
        rest[:, : stop - start, : stop - start] = 0
        assert not rest.any()


def test_a_block_is_as_much_as_fits() -> None:
    layer = nn.Linear(1000, 3)
    assert block_of(layer, 4 * 1000**2) == 1000
    assert block_of(layer, 4 * 1000**2 - 1) == 500
    for memory in (10**5, 10**6):
        block = block_of(layer, memory)
        assert 4 * block**2 * -(-1000 // block) <= memory


class Twice(nn.Module):
    """Calls a layer twice, on inputs of two kinds, and holds another that no image reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.rare, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(10 * self.conv(x)).mean((2, 3))
        return self.last(self.rare(y) if x.min() < -1 else y)


@torch.no_grad()
def test_both_calls_of_a_layer_count_and_batches_make_no_difference() -> None:
    network, x = Twice(), torch.rand(6, 3, 8, 8)
    prepared = prepare(network, x[:2])
    seen = calibrate(prepared, x)
    blocks = {index: module.weight[0].numel() for index, module in enumerate(prepared.modules)}
    found = second_moments(prepared, x, seen, blocks)[0]
    calls = torch.cat([x, 10 * network.conv(x)])
    matrix, _ = expected(unfolded(network.conv, calls))
    assert isinstance(found, Moments)
    assert torch.allclose(found.matrix[:, 0].double(), matrix, rtol=1e-4, atol=1e-4)
    one, other = (second_moments(prepared, part, seen, {0: blocks[0]})[0] for part in x.split([1, 5]))
    assert isinstance(one, Moments)
    assert isinstance(other, Moments)
    assert torch.allclose((one + other).mean, found.mean, atol=1e-4)
