"""Features are those of the function, whoever wrote it and however many images are looked at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from tap_eval.images.images import Images, Transform
from tap_eval.measuring.bench import Bench
from tap_eval.preparing.prepare import prepare
from tap_eval.proxies.features import TASK, describe, visible
from tap_eval.proxies.statistics import Statistics
from tap_eval.quantization.rounding import nearest
from tests.tap_eval.preparing.networks import NormAct, randomized

IMAGES = Images(
    np.random.default_rng(0).integers(0, 256, (7, 3, 16, 16), np.uint8),
    torch.zeros(7, dtype=torch.int64),
    Transform(mean=(0.5,) * 3, std=(0.5,) * 3),
)


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).relu_() ** 2 - 0.5
    rows[2] = 4
    found = Statistics(3)
    for step in (found.first, found.second):
        for part in rows.split([1, 399, 600], dim=1):
            step(part)
    values = found.values()
    for index, row in enumerate(rows[:2].numpy()):
        counts, _ = np.histogram(row, 256)
        expected = {
            "l1": np.abs(row).sum(),
            "l2": np.sqrt(np.square(row, dtype=np.float64).sum()),
            "mean": row.mean(dtype=np.float64),
            "std": row.std(dtype=np.float64),
            "absmax": np.abs(row).max(),
            "kurtosis": scipy.stats.kurtosis(row.astype(np.float64), fisher=False),
            "entropy": scipy.stats.entropy(counts),
            "sparsity": (row == 0).mean(),
            "power": np.square(row, dtype=np.float64).mean(),
        }
        assert {name: float(value[index]) for name, value in values.items()} == pytest.approx(expected, rel=1e-3)
    assert [float(values[name][2]) for name in ("std", "entropy", "kurtosis")] == [0, 0, 0]


def tuned(features: list[dict[str, Any]]) -> list[float]:
    """Every number in them but those of names and places."""
    numbers: list[float] = []
    for layer in features:
        for name, value in layer.items():
            if isinstance(value, dict):
                numbers += [number for values in value.values() for number in values]
            elif isinstance(value, list):
                numbers += [float(len(value))]
            elif name not in ("name", "block", "kind"):
                numbers.append(float(value))
    return numbers


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


def test_a_network_with_its_norms_folded_has_the_features_of_the_one_with_them_apart() -> None:
    torch.manual_seed(0)
    apart = randomized(Blocks(nn.Conv2d(3, 8, 3, bias=False), NormAct(8), nn.Conv2d(8, 8, 3, padding=1), NormAct(8)))
    first = prepare(apart, IMAGES.pixels[:2])
    folded = Blocks(*(layer for module in first.modules[:2] for layer in (module, nn.SiLU())))
    folded.head = apart.head
    second = prepare(folded, IMAGES.pixels[:2])
    assert len(first.folded) == 2
    assert not second.folded
    expected, got = (tuned(describe(each, IMAGES, "statistics")) for each in (first, second))  # type: ignore[arg-type]
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_bound_on_memory_changes_nothing_else() -> None:
    torch.manual_seed(0)
    prepared = prepare(Blocks(nn.Conv2d(3, 8, 3), nn.ReLU()), IMAGES.pixels[:2])
    seen: list[int] = []
    prepared.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    whole = describe(prepared, IMAGES, "statistics")
    assert seen == [7, 7, 7, 1]  # the last for the record of its steps
    seen.clear()
    parts = describe(prepared, IMAGES, "statistics", memory=150_000)
    assert max(seen) < 7
    assert tuned(parts) == pytest.approx(tuned(whole), rel=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", ["metadata", "statistics"])
def test_a_proxy_sees_exactly_what_is_published(bench: Bench, inputs: str) -> None:
    described = describe(bench.prepared, bench.splits.calibrations[0], inputs)  # type: ignore[arg-type]
    for features in described:
        assert features.keys() == visible(inputs).keys()  # type: ignore[arg-type]
    assert bench.described_task.keys() == TASK.keys()
    assert [features["kind"] for features in described[:3]] == ["conv", "depthwise", "conv"]


def test_statistics_are_those_of_weights_and_activations(bench: Bench) -> None:
    features, weight = bench.features[0], bench.prepared.module(bench.layers[0]).weight
    assert features["weight_l2"] == pytest.approx(float(weight.norm()), rel=1e-5)
    assert features["weight_absmax"] == pytest.approx(float(weight.abs().max()), rel=1e-5)
    channels = features["channels"]
    assert isinstance(channels, dict)
    assert channels["weight_l1"] == pytest.approx(weight.abs().sum((1, 2, 3)).tolist(), rel=1e-5)
    assert 0 <= features["activation_entropy"] <= math.log(256)  # type: ignore[operator]


class Either(nn.Module):
    """Goes one way for bright images and another for dark ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        way = self.bright if x.mean() > 0 else self.dark
        return self.last(way(x).relu().mean((2, 3)))


def test_a_layer_that_no_calibration_image_reaches_is_described_by_those_on_which_it_was_found() -> None:
    torch.manual_seed(0)
    bright = IMAGES.pixels.abs()
    prepared = prepare(Either(), bright[:2], [bright, -bright])
    assert [layer.name for layer in prepared.layers] == ["bright", "last", "dark"]
    found, of_dark = describe(prepared, bright, "statistics"), describe(prepared, -bright, "statistics")
    assert found[2] == of_dark[2]
    assert found[:2] != of_dark[:2]
    assert found[2]["input_trace"] > 0  # type: ignore[operator]
    assert all(map(math.isfinite, tuned(found)))  # type: ignore[arg-type]


class Grouped(Blocks):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=4))


def unfolded(x: Tensor, groups: int, **options: int) -> Tensor:
    """(G, positions, inputs) float64."""
    patches = nn.functional.unfold(x.double(), 3, **options)
    return patches.view(len(x), groups, -1, patches.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)


@torch.no_grad()
def test_moments_are_those_that_rounding_goes_by() -> None:
    torch.manual_seed(0)
    network = Grouped()
    prepared = prepare(network, IMAGES.pixels[:2])
    first, second = network.blocks[0], network.blocks[2]
    middle = first(IMAGES.pixels).relu()
    inputs = [
        unfolded(IMAGES.pixels, 1, stride=2, padding=1),
        unfolded(middle, 4),
        second(middle).mean((2, 3)).double()[None],
    ]
    outputs = [layer(x).transpose(0, 1).flatten(1) for layer, x in ((first, IMAGES.pixels), (second, middle))]
    described = describe(prepared, IMAGES, "statistics")
    for features, rows in zip(described, inputs, strict=True):
        moments = rows.transpose(1, 2) @ rows / rows.shape[1]
        eigenvalues = torch.linalg.eigvalsh(moments)
        ranks = eigenvalues.sum(1) ** 2 / eigenvalues.square().sum(1)
        assert features["input_trace"] == pytest.approx(float(eigenvalues.sum(1).mean()), rel=1e-4)
        assert features["input_rank"] == pytest.approx(float(ranks.mean()), rel=1e-4)
        assert 1 <= features["input_rank"] <= rows.shape[2]  # type: ignore[operator]
    for features, y in zip(described, outputs, strict=False):
        power = y.square().mean(1)
        assert features["activation_power"] == pytest.approx(float(power.mean()), rel=1e-4)
        assert features["channels"]["activation_power"] == pytest.approx(power.tolist(), rel=1e-4)  # type: ignore[index,call-overload]
    for features, rows, module in zip(described, inputs, prepared.modules, strict=True):
        errors = features["rounding_error"]
        assert isinstance(errors, dict)
        assert errors.keys() == {"2", "4", "8"}
        for bits, values in errors.items():
            off = (nearest(module.weight, int(bits)).real() - module.weight).double()
            differences = rows @ off.view(len(rows), -1, rows.shape[2]).transpose(1, 2)
            expected = differences.var(1, correction=0).flatten()
            assert values == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-9)
    for features, x in zip(described, (IMAGES.pixels, middle), strict=False):
        by_channel = x.transpose(0, 1).flatten(1).double()
        found = features["input_channels"]
        assert isinstance(found, dict)
        assert found["mean"] == pytest.approx(by_channel.mean(1).tolist(), abs=1e-5)
        assert found["variance"] == pytest.approx(by_channel.var(1, correction=0).tolist(), rel=1e-4)
    small = describe(prepared, IMAGES, "statistics", memory=3000)
    traces, cut = ([features["input_trace"] for features in each] for each in (described, small))
    assert cut == pytest.approx(traces, rel=1e-4)
    assert small[0]["input_rank"] > described[0]["input_rank"]  # type: ignore[operator]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise, self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x).relu()
        second = (first + self.one(first)).relu()
        third = second + nn.functional.silu(self.depthwise(second))
        return self.head(nn.functional.adaptive_avg_pool2d(self.wide(third), 2).flatten(1))


def test_a_layer_knows_what_reads_its_output_and_how_strongly() -> None:
    torch.manual_seed(0)
    network = Residual()
    described = describe(prepare(network, IMAGES.pixels[:2]), IMAGES, "statistics")
    assert [layer["name"] for layer in described] == ["stem", "one", "depthwise", "wide", "head"]
    assert [layer["consumers"] for layer in described] == [[1, 2], [2], [3], [4], []]
    assert [layer["operations"] for layer in described] == [
        ["relu", "addition"], ["addition", "relu"], ["silu", "addition"], ["average"], [],
    ]  # fmt: skip

    def norms(layer: dict[str, Any]) -> list[float]:
        return layer["channels"]["consumer_weight"]  # type: ignore[no-any-return]

    one, depthwise = (module.weight.detach().square() for module in (network.one, network.depthwise))
    read = (one.sum((0, 2, 3)) + depthwise.sum((1, 2, 3))).sqrt()
    assert norms(described[0]) == pytest.approx(read.tolist(), rel=1e-4)
    assert norms(described[2]) == pytest.approx(network.wide.weight.norm(dim=0).flatten().tolist(), rel=1e-4)
    flat = network.head.weight.view(5, 6, 4).norm(dim=(0, 2))
    assert norms(described[3]) == pytest.approx(flat.tolist(), rel=1e-4)
    assert norms(described[4]) == [0] * 5


class Forked(Blocks):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 1e9 else x + 1)


def test_of_a_network_whose_steps_depend_on_the_image_no_consumers_are_known() -> None:
    described = describe(prepare(Forked(), IMAGES.pixels[:2]), IMAGES, "statistics", bits=(3,))
    for layer in described:
        assert (layer["consumers"], layer["operations"]) == ([], [])
        assert layer["rounding_error"].keys() == {"3"}  # type: ignore[union-attr]
