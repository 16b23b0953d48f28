"""Everything that measures runs on a device: on one that is only pretended, on CPUs side by side, on a real one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.device import CPU, DeviceMistake
from tap_eval.images.images import AS_THEY_ARE, Images, Splits
from tap_eval.kept import Kept
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.devices import spread_over
from tap_eval.measuring.job import Job
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.measurer import Measurer
from tap_eval.measuring.recipe import Bounds, Recipe
from tap_eval.measuring.task import Task
from tap_eval.networks.digits import DigitsCNN
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization.integer import Unfit
from tap_eval.quantization.quantizer import Allocation
from tests.tap_eval.fake import CUDA, NEEDS_BUILD, NEEDS_CUDA, fake_cuda

TABLE = torch.rand(8, generator=torch.Generator().manual_seed(0))
IMAGES = Images(np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8), torch.arange(40) % 10, AS_THEY_ARE)


class Mixed(nn.Module):
    """Layers of each kind; tables that are a buffer, in a list, global, and made anew on the CPU, for a layer too."""

    def __init__(self, look: Callable[[Tensor], Any] = abs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.deep = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.kept = nn.BatchNorm2d(8), nn.Buffer(torch.rand(8))
        self.listed, self.look = [torch.rand(8)], look
        self.places, self.tokens, self.last = nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        y = (y + self.deep(y)).flatten(2).transpose(1, 2) * self.kept + self.listed[0] * TABLE
        y = y + self.places(torch.linspace(0, 1, 64)[:, None])
        self.look(y)
        return self.last(torch.cat([torch.zeros(len(y), 1, 8), self.tokens(y).relu()], 1).mean(1))


def measurer(network: nn.Module) -> Measurer:
    prepared = prepare(network.eval(), IMAGES.pixels[:8])
    splits = Splits("noise", tuple("0123456789"), (IMAGES.only(np.arange(8)),), IMAGES, IMAGES)
    splits.calibrations[0].digest  # noqa: B018 of images that are real
    recipe = Recipe("gptq", (2, 4), "noise", Kept(None), "int8")
    return Measurer(prepared, splits, uniform(prepared.layers, 4), Bounds(batch=16), recipe)


@NEEDS_BUILD
@pytest.mark.parametrize("answer", [False, True])
def test_no_operation_takes_tensors_of_two_devices(answer: bool) -> None:
    here = measurer(Mixed())
    mixed = Allocation(((2, 4) * 4, 2, 4, 2, 2), (8,) * 5)
    with fake_cuda(answer):
        there = here.beside(CUDA)
        if answer:
            with pytest.raises(Unfit):
                there._program  # noqa: B018
        else:
            assert there._program.device == CUDA
        assert there.sums is not answer
        for allocation, finished in ((None, False), (mixed, False), (mixed, True)):
            job = Job(allocation, "search", 0, np.arange(40), integers=False, sums=there.sums, finished=finished)
            assert there._simulated(job, there._splits.search.on(CUDA)).shape == (40, 10)
        for weight in there.finished(0, mixed):
            assert {weight.integers.device, weight.scale.device, weight.bias.device} == {CUDA}
        assert len(there.layer_errors(2, 20)) == len(here.prepared.layers)
        for layer in there.quantized(0, mixed, finished=True).layers:
            assert layer.weight is not None
            assert {layer.weight.integers.device, layer.weight.bias.device, layer.layer.weight.device} == {CPU}


@NEEDS_BUILD
def test_a_network_that_does_not_run_on_a_device_is_refused_with_the_next_step() -> None:
    here = measurer(Mixed(lambda y: y.detach().numpy().max()))
    with fake_cuda(), pytest.raises(DeviceMistake, match=r"^cuda:0: the network does not run there .*--device cpu\.$"):
        here.beside(CUDA)


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


def test_several_devices_measure_side_by_side_what_one_measures(splits: Splits, tmp_path: Path) -> None:
    task, found = Task(Choices(), Budget.parse("3bit")), []
    for devices in ([CPU], [CPU, CPU]):
        folder = tmp_path / str(len(devices))
        bench = Bench("small", Hungry(), splits, task, Ledger(folder / "ledger.sqlite"), spread=spread_over(devices))
        bits = [uniform(bench.layers, each) for each in (2, 3, 4)]
        found.append((bench.layer_errors, bench.measure_all(bits, "search", [0, 1], kept=True)))
        assert any("on cpu, cpu side by side" in note for note in bench.notes) == (len(devices) > 1)
    assert found[0] == found[1]


def test_where_memory_is_small_images_are_taken_by_the_half_for_all_that_is_measured(
    splits: Splits, tmp_path: Path
) -> None:
    task, found = Task(Choices(), Budget.parse("3bit")), []
    for most in (1000, 5):
        bench = Bench("hungry", Hungry(), splits, task, Ledger(tmp_path / str(most) / "ledger.sqlite"))
        assert isinstance(bench.prepared.network, Hungry)
        bench.prepared.network.most = most
        found.append((bench.layer_errors, bench.measure(Allocation((2, 4), (8, 8)), "test", finished=True).top1))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert found[1][1] == pytest.approx(found[0][1], abs=0.02)
    bench.prepared.network.most = 0
    with pytest.raises(RuntimeError, match="allocate memory"):
        bench.measure(None)


@NEEDS_CUDA
@pytest.mark.cuda
def test_a_gpu_measures_what_the_cpu_measures_and_is_kept_apart(
    network: DigitsCNN, splits: Splits, tmp_path: Path
) -> None:
    task, ledger = Task(Choices(), Budget.parse("3bit")), Ledger(tmp_path / "ledger.sqlite")
    benches = [Bench("digits", network, splits, task, ledger, device=device) for device in (CPU, CUDA)]
    here, there = benches
    assert there.features == here.features
    assert there.unfit == "cuda:0 multiplies whole numbers as floats"
    assert there.layer_errors == pytest.approx(here.layer_errors, rel=0.05)
    bits, measured = Allocation((*(4,) * 9, (2, 4) * 5), (8,) * 10), ledger.measured
    for finished in (False, True):
        top1 = [bench.measure(bits, "test", finished=finished).top1 for bench in benches]
        assert top1[1] == pytest.approx(top1[0], abs=0.02)
    assert ledger.measured == measured + 6, "full precision twice, which divergence is from"
    assert there.measure(None, "test") == here.measure(None, "test")
    layers = there.quantized(bits).layers
    assert {each.weight.integers.device for each in layers if each.weight} == {CPU}
