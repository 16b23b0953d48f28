"""What rules see of gradients and Hessians, against quadratics, and against a network of two layers by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tap_eval.baselines import auto_quantize, emq, ompq, snip, synflow
from tap_eval.baselines.curvature import top_eigenvalues, traces
from tap_eval.baselines.gradients import Loss, Network
from tap_eval.device import CPU
from tap_eval.images.images import Splits
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import ImagesMistake, NetworkMistake
from tap_eval.networks.digits import DigitsCNN
from tap_eval.quantization.rounding import nearest
from tests.tap_eval.baselines.small import Stopped, by_hand, opened, two_layers
from tests.tap_eval.fake import CUDA, NEEDS_BUILD, NEEDS_CUDA, fake_cuda


@pytest.fixture
def bench(splits: Splits, tmp_path: Path) -> Bench:
    return opened(two_layers(), splits, tmp_path)


def quadratic(parts: int) -> tuple[Loss, Tensor, Tensor]:
    """1/2 v H v of two weights together, in equal parts; and the blocks of H of each of them."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    first = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    second = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()

    def part() -> Tensor:
        v = torch.cat([first.flatten(), second])
        return v @ hessian @ v / 2 / parts

    return Loss([first, second], [part] * parts), hessian[:6, :6], hessian[6:, 6:]


@pytest.mark.parametrize("parts", [1, 3])
def test_eigenvalues_and_traces_are_those_of_a_given_hessian(parts: int) -> None:
    loss, *blocks = quadratic(parts)
    values, steps = top_eigenvalues(loss, seed=0)
    assert values == pytest.approx([float(torch.linalg.eigvalsh(block).max()) for block in blocks], rel=1e-2)
    assert 2 <= steps <= 200
    found, steps = traces(loss, seed=0)
    assert found == pytest.approx([float(block.trace()) for block in blocks], rel=0.25)
    assert 4 <= steps <= 200
    assert (found, steps) == traces(loss, seed=0)
    assert found != traces(loss, seed=1)[0]


def test_a_diagonal_hessian_has_its_trace_after_two_steps_and_a_negative_eigenvalue_is_found() -> None:
    weight = torch.ones(3, dtype=torch.float64).requires_grad_()
    diagonal = torch.tensor([1.0, -5.0, 2.0], dtype=torch.float64)
    loss = Loss([weight], [lambda: (diagonal * weight.square()).sum() / 2])
    assert traces(loss, seed=0) == ([pytest.approx(-2)], 2)
    assert top_eigenvalues(loss, seed=0)[0] == [pytest.approx(-5, rel=1e-2)]


def test_traces_are_not_disturbed_by_what_pairs_of_weights_share() -> None:
    first, second = (torch.ones(3, dtype=torch.float64).requires_grad_() for _ in range(2))
    loss = Loss([first, second], [lambda: first.square().sum() / 2 + second.square().sum() + 1e4 * first @ second])
    assert traces(loss, seed=0) == ([pytest.approx(3), pytest.approx(6)], 4)


def test_a_loss_that_is_linear_in_a_weight_has_no_curvature_there() -> None:
    weight = torch.ones(3, dtype=torch.float64).requires_grad_()
    loss = Loss([weight], [lambda: weight.sum()])
    assert traces(loss, seed=0)[0] == [0]
    assert top_eigenvalues(loss, seed=0)[0] == [0]


def test_curvature_of_a_network_is_that_of_its_whole_hessian(splits: Splits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    bench = opened(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)), splits, tmp_path)
    images, (linear,) = bench.splits.calibrations[0], bench.prepared.modules
    rows = nn.AvgPool2d(2)(images.pixels).flatten(1)

    def loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(rows @ weight.T + linear.bias, images.labels)

    hessian = torch.autograd.functional.hessian(loss, linear.weight.detach()).reshape(160, 160)
    network = Network(bench)
    values, _ = top_eigenvalues(network.cross_entropy(), seed=0)
    assert values == pytest.approx([float(torch.linalg.eigvalsh(hessian).max())], rel=1e-2)
    assert traces(network.cross_entropy(), seed=0)[0] == pytest.approx([float(hessian.trace())], rel=0.1)


def test_snip_is_what_masking_weights_does_to_the_loss(bench: Bench) -> None:
    x, first, second, hidden, change = by_hand(bench)
    gradients = ((change @ second) * (hidden > 0)).T @ x, change.T @ hidden
    expected = [
        float((gradient * weight).abs().sum()) for gradient, weight in zip(gradients, (first, second), strict=True)
    ]
    assert snip.scores(bench) == pytest.approx(expected, rel=1e-4)


def test_synflow_is_the_same_in_both_layers_and_the_flow_of_positive_weights(bench: Bench) -> None:
    _, first, second, _, _ = by_hand(bench)
    flow = float((second.abs() @ first.abs()).sum())
    assert synflow.scores(bench) == pytest.approx([flow, flow], rel=1e-6)


def test_synflow_is_refused_where_activations_saturate(splits: Splits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 32), nn.ReLU6(), nn.Linear(32, 10)
    nn.init.uniform_(layers[1].weight, 1, 2)  # type: ignore[arg-type]
    with pytest.raises(NetworkMistake, match=r"^nothing flows through 1 of small once weights are positive, as where"):
        synflow.scores(opened(nn.Sequential(*layers), splits, tmp_path))


def test_emq_weighs_weights_by_their_share_of_the_gradient(bench: Bench) -> None:
    _, first, second, _, _ = by_hand(bench)
    hidden = (first.sum(1)).clamp_min(0)
    gradients = (second.sum(0) * (hidden > 0))[:, None].expand(6, 64), hidden.expand(10, 6)
    expected = [
        float((gradient.abs() / gradient.abs().sum() * weight.clamp_min(0).sqrt()).sum())
        for gradient, weight in zip(gradients, (first, second), strict=True)
    ]
    assert emq.scores(bench) == pytest.approx(expected, rel=1e-4)


def test_auto_quantize_is_the_squared_gradient_times_the_squared_change_of_outputs(bench: Bench) -> None:
    x, first, second, hidden, change = by_hand(bench)
    by_output = (change @ second) * (hidden > 0), change
    found = auto_quantize.scores(bench, [2, 4])
    for column, bits in enumerate((2, 4)):
        for row, (weight, values) in enumerate(((first, x), (second, hidden))):
            moved = values @ (nearest(weight.float(), bits).real().double() - weight).T
            moved = moved - moved.mean(0)  # the bias makes up for the mean shift, in whole units
            assert found[row][column] == pytest.approx(float((by_output[row] * moved).square().sum()), rel=1e-2)


class Hungry(nn.Module):
    """Needs too much memory for more than `most` images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.most, self.first, self.last = 1000, nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            torch.empty(10**15)
        return self.last(self.first(x.flatten(1)).relu())


def test_where_memory_is_small_gradients_are_the_same_in_smaller_batches(splits: Splits, tmp_path: Path) -> None:
    bench = opened(Hungry(), splits, tmp_path)
    expected = snip.scores(bench)
    network = bench.prepared.network
    assert isinstance(network, Hungry)
    network.most = 5
    assert snip.scores(bench) == pytest.approx(expected, rel=1e-4)
    assert bench.prepared.room.images > 5, "what is measured still has room"
    network.most = 0
    with pytest.raises(NetworkMistake, match=r"small does not run as this baseline needs it .*memory.*: leave it out"):
        snip.scores(bench)


def test_grams_are_of_the_outputs_of_layers_for_each_image(bench: Bench) -> None:
    x, first, second, hidden, _ = by_hand(bench)
    for found, outputs in zip(ompq.grams(bench), (x @ first.T, hidden @ second.T), strict=True):
        assert torch.tensor(found) == pytest.approx((outputs @ outputs.T).float(), rel=1e-3, abs=1e-3)


@NEEDS_BUILD
def test_features_are_computed_where_the_network_is(bench: Bench) -> None:
    bench.digest  # noqa: B018 of values that are real
    bench.device = CUDA
    with fake_cuda():
        assert [len(each) for each in ompq.grams(bench)] == [16, 16]


@NEEDS_CUDA
@pytest.mark.cuda
def test_a_gpu_gives_the_scores_that_the_cpu_gives(network: DigitsCNN, splits: Splits, tmp_path: Path) -> None:
    here, there = (opened(network, splits, tmp_path, device=device) for device in (CPU, CUDA))
    for scores in (snip.scores, synflow.scores, emq.scores):
        assert scores(there) == pytest.approx(scores(here), rel=1e-2)
    expected, found = (traces(Network(each).cross_entropy(), seed=0)[0] for each in (here, there))
    assert found == pytest.approx(expected, rel=1e-2)
    rows = zip(auto_quantize.scores(here, [2, 4]), auto_quantize.scores(there, [2, 4]), strict=True)
    assert all(row == pytest.approx(expected, rel=1e-2) for expected, row in rows)


def test_a_network_that_stops_gradients_or_images_without_labels_are_a_sentence(splits: Splits, tmp_path: Path) -> None:
    with pytest.raises(NetworkMistake, match=r"^small has no gradients in first, since its code stops them: leave out"):
        snip.scores(opened(Stopped(), splits, tmp_path))
    unknown = replace(splits.calibrations[0], labels=torch.full_like(splits.calibrations[0].labels, -1))
    bench = opened(two_layers(), replace(splits, calibrations=(unknown,)), tmp_path)
    with pytest.raises(ImagesMistake, match="has no labels of its calibration images: leave out"):
        snip.scores(bench)
    assert len(synflow.scores(bench)) == 2
