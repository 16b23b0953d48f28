"""Each rule chooses the range that NumPy finds by itself, over all images and all calls of a layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tap_eval.allocation.choices import uniform
from tap_eval.export import safetensors
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import Program, record
from tap_eval.quantization import ranges as rules
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.quantizer import Affine, QuantizedNetwork
from tap_eval.quantization.ranges import Range, RangeRule
from tap_eval.quantization.sums import Sums, ranges


class Tailed(nn.Module):
    """A layer that is called twice, on inputs with long tails, and a sum that no layer reads all of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x**3)
        return self.last((y + self.conv(3 * y)).mean((2, 3)))


IMAGES = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7).view(6, 1, 1, 1)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(Tailed().eval(), IMAGES[:2])


def inputs_of(network: nn.Module, name: str) -> list[np.ndarray]:
    """All that a module reads, of each image by itself."""
    found: list[np.ndarray] = []

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        parts.append(args[0].numpy().ravel())

    handle = network.get_submodule(name).register_forward_pre_hook(see)
    for image in IMAGES.split(1):
        parts: list[np.ndarray] = []
        with torch.no_grad():
            network(image)
        found.append(np.concatenate(parts))
    handle.remove()
    return found


def off(values: np.ndarray, ends: Range, bits: int) -> float:
    """The squared error of all values, rounded one by one."""
    low, high = min(ends[0], 0), max(ends[1], 0)
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    whole = np.clip(np.round(values.astype(np.float64) / scale) + zero, 0, 2**bits - 1)
    return float((((whole - zero) * scale - values) ** 2).sum())


def expected(rule: RangeRule, images: list[np.ndarray]) -> Range:
    if rule == "ema":
        low, high = images[0].min(), images[0].max()
        for each in images[1:]:
            low, high = 0.9 * low + 0.1 * each.min(), 0.9 * high + 0.1 * each.max()
        return float(low), float(high)
    values = np.sort(np.concatenate(images)).astype(np.float64)
    if rule == "minmax":
        return values[0], values[-1]
    places = np.array([0.001, 0.999]) * (len(values) - 1)
    below, part = np.floor(places).astype(int), places % 1
    low, high = values[below] * (1 - part) + values[below + 1] * part
    return float(low), float(high)


@pytest.mark.parametrize("rule", ["minmax", "ema", "percentile"])
def test_a_rule_gives_what_numpy_gives(prepared: Prepared, rule: RangeRule) -> None:
    for seen, name in zip(calibrate(prepared, IMAGES, rule), ("conv", "last"), strict=True):
        wanted = expected(rule, inputs_of(prepared.network, name))
        for bits in (4, 8):
            assert seen.range_at(bits) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_omse_gives_the_least_error_of_many_ranges(prepared: Prepared, bits: int) -> None:
    for seen, name in zip(calibrate(prepared, IMAGES, "omse"), ("conv", "last"), strict=True):
        values = np.concatenate(inputs_of(prepared.network, name))
        found = off(values, seen.range_at(bits), bits)
        shares = np.linspace(0.04, 1, 25)
        tried = [(low * values.min(), high * values.max()) for low in shares for high in shares]
        assert found <= 1.01 * min(off(values, ends, bits) for ends in tried)
        assert found <= 1.0001 * off(values, (values.min(), values.max()), bits)


def test_omse_cuts_more_off_where_there_are_fewer_bits(prepared: Prepared) -> None:
    seen, _ = calibrate(prepared, IMAGES, "omse")
    widths = [high - low for low, high in (seen.range_at(bits) for bits in (2, 4, 8))]
    assert widths == sorted(widths)
    assert widths[0] < 0.5 * widths[-1]
    layer = QuantizedNetwork(prepared, calibrate(prepared, IMAGES, "omse")).layers[0]
    assert layer.covering(4) == Affine.covering(*seen.range_at(4), 4)


@pytest.mark.parametrize("x", [torch.zeros(10), torch.full((10,), 3.0), -torch.rand(10), torch.tensor([2.0])])
@pytest.mark.parametrize("rule", ["minmax", "ema", "percentile", "omse"])
def test_a_rule_gives_a_range_of_any_numbers(rule: RangeRule, x: Tensor) -> None:
    low, high = rules.chosen(rule, [x, x], 8)
    affine = Affine.covering(low, high, 8)
    assert float((affine.rounded(x) - x).abs().max()) <= affine.scale * 2


def test_many_numbers_are_looked_at_some_at_a_time(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrate(prepared, IMAGES, "omse")
    monkeypatch.setattr(rules, "_HELD", 1)
    assert [seen.range_at(4) for seen in calibrate(prepared, IMAGES, "omse")] == [seen.range_at(4) for seen in whole]
    monkeypatch.setattr(rules, "_MOST", 1000)
    for some, seen in zip(calibrate(prepared, IMAGES, "percentile"), calibrate(prepared, IMAGES, "ema"), strict=True):
        assert some.high > some.low
        assert seen.high > seen.low
    assert [seen.high for seen in calibrate(prepared, IMAGES, "ema")] == pytest.approx(
        [expected("ema", inputs_of(prepared.network, name))[1] for name in ("conv", "last")], rel=1e-4
    )


@pytest.mark.parametrize("rule", ["ema", "percentile"])
def test_ranges_between_layers_follow_the_rule(prepared: Prepared, rule: RangeRule) -> None:
    program = record(prepared, IMAGES[:1])
    found = ranges(program, prepared.modules, IMAGES, rule)
    with torch.no_grad():
        y = prepared.network.conv(IMAGES**3)
        again = prepared.network.conv(3 * y)
    values = {id(each): [image.numpy().ravel() for image in each] for each in (y, again, y + again)}
    wanted = [expected(rule, images) for images in values.values()]
    for ends in found:
        assert any(ends == pytest.approx(each, rel=1e-3) for each in wanted), "one of the three that are carried"


def test_the_usual_ranges_are_from_the_least_to_the_greatest_number_to_the_last_bit(prepared: Prepared) -> None:
    usual, named = (calibrate(prepared, IMAGES, *rule) for rule in ((), ("minmax",)))
    with torch.no_grad():
        y = prepared.network.conv(IMAGES**3)
    both = torch.cat([IMAGES**3, 3 * y])
    assert (usual[0].low, usual[0].high) == pytest.approx((float(both.min()), float(both.max())), rel=1e-6)
    networks = [QuantizedNetwork(prepared, seen) for seen in (usual, named)]
    for network in networks:
        network.choose(uniform(prepared.layers, 4))
    one, other = (network.logits(IMAGES, 6) for network in networks)
    assert torch.equal(one, other)
    assert all(seen.range_at(bits) == (seen.low, seen.high) for seen in usual for bits in range(2, 9))


@pytest.mark.parametrize("rule", ["ema", "omse"])
def test_a_file_holds_the_ranges_of_the_rule(prepared: Prepared, rule: RangeRule, tmp_path: Path) -> None:
    def recorded(batch: int) -> Program:
        return record(prepared, IMAGES[:1].expand(batch, -1, -1, -1).contiguous())

    sums = Sums(ranges(recorded(1), prepared.modules, IMAGES, rule), recorded)
    network = QuantizedNetwork(prepared, calibrate(prepared, IMAGES, rule), sums=sums)
    allocation = uniform(prepared.layers, 4, 4)
    network.choose(allocation)
    path = tmp_path / "model.safetensors"
    safetensors.write(path, network, allocation, {})
    again = safetensors.read(path, prepared)
    assert [layer.affine for layer in again.layers] == [layer.affine for layer in network.layers]
    assert torch.equal(again.logits(IMAGES, 6), network.logits(IMAGES, 6))
