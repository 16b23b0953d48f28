"""Sizes are those of a packed file, and a budget in bytes holds them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget, check_feasible, check_within, spent
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.allocation.score import Score
from tap_eval.allocation.size import Size, full_size, packed_size
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BudgetMistake
from tap_eval.preparing.layers import Layer
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization.quantizer import Allocation, LayerBits
from tap_eval.quantization.sums import Ranged
from tests.tap_eval.allocation.layers import make_layers


class Tiny(nn.Module):
    """A convolution with its norm, an embedding that stays in float, and a head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)
        self.scale = nn.Parameter(torch.rand(5, 1, 1) + 0.5)
        self.head = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((torch.relu(self.norm(self.conv(x))) * self.scale).mean((2, 3)))


def test_the_size_of_a_tiny_network_is_what_a_hand_computes() -> None:
    torch.manual_seed(0)
    prepared = prepare(Tiny().eval(), torch.rand(2, 3, 8, 8))
    rest = 4 * prepared.left
    assert full_size(prepared) == Size(4 * (5 * 27 + 4 * 5), 0, 4 * 5, 0, 0, 4 * 5)
    packed = packed_size(prepared.layers, Allocation(((3, 3, 2, 4, 4), 2), (8, 8)), rest)
    rows = 2 * 11 + 7 + 2 * 14 + 4 * 2  # 27 weights are 81, 54 or 108 bits; 5 weights are 10
    assert packed == Size(rows, 4 * (5 + 4), 4 * (5 + 4), 2 * (4 + 1), 5, 4 * 5)
    assert packed.total == sum(packed.parts().values()) == rows + 36 + 36 + 10 + 5 + 20
    assert packed_size(prepared.layers, Allocation(((3,) * 5, 2), (8, 8)), rest).channel_bits == 0


def test_a_weight_that_is_read_in_several_ways_is_once_in_full_precision() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3)) + self.table((x.mean((1, 2, 3)) > 0.5).long()))

    prepared = prepare(Tied().eval(), torch.rand(2, 3, 8, 8))
    assert full_size(prepared).total == 4 * 12
    packed = packed_size(prepared.layers, uniform(prepared.layers, 8), 4 * prepared.left)
    assert (packed.weights, packed.rest) == (12, 4 * 12)


def random_layers(rng: random.Random) -> list[Layer]:
    layers = make_layers(*[1] * rng.randint(1, 6))
    sizes = [(rng.randint(1, 40), rng.randint(1, 300)) for _ in layers]
    return [
        replace(layer, out_channels=out, params=out * row, macs=out * row * rng.randint(1, 50))
        for layer, (out, row) in zip(layers, sizes, strict=True)
    ]


def random_bits(rng: random.Random, layer: Layer) -> LayerBits:
    bits = tuple(rng.randint(2, 8) for _ in range(layer.out_channels))
    return rng.choice((bits, bits[0], bits[:1] * layer.out_channels))


def random_sums(rng: random.Random, layers: Sequence[Layer]) -> Ranged:
    return Ranged(rng.randint(0, 3), tuple(rng.randrange(len(layers)) for _ in range(rng.randint(0, 4))))


def test_what_is_allocated_is_never_a_byte_above_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(150):
        layers, rest = random_layers(rng), 4 * rng.choice((0, rng.randint(1, 1000)))
        sums = random_sums(rng, layers)
        choices = Choices(
            rng.choice([(2, 4, 8), (2, 3, 4, 8), (3, 5), (8,)]), rng.choice([(8,), (4, 8), (3, 5), (4,)]),
            rng.random() < 0.3, rng.randint(1, 6),
        )  # fmt: skip
        scores: list[Score] = [
            [rng.lognormvariate(0, 1) for _ in range(layer.out_channels)] if rng.random() < 0.8 else rng.random()
            for layer in layers
        ]
        activations = (max(choices.activations),) * len(layers)
        cheapest = Allocation(tuple(choices.of(layer)[0][0] for layer in layers), activations)
        least = packed_size(layers, cheapest, rest, sums).total
        most = packed_size(layers, uniform(layers, 8), rest, sums).total
        limit = rng.choice((least, least + rng.randint(0, 5), rng.randint(least, max(least, most))))
        budget = Budget.parse(f"{limit}B").beside(rest, sums)
        found = allocate(scores, layers, choices, budget)
        assert packed_size(layers, found, rest, sums).total <= limit
        with pytest.raises(BudgetMistake):
            check_feasible(layers, choices, Budget.parse(f"{least - 1}B").beside(rest, sums))
        assert min(found.activations) == max(choices.activations)
        known = Allocation(tuple(random_bits(rng, layer) for layer in layers), tuple(rng.randint(2, 8) for _ in layers))
        left = limit - packed_size(layers, known, rest, sums).total
        assert budget.limit(layers) - spent(known, layers, budget) == left


def test_a_proxy_of_its_own_allocator_is_within_bytes_when_within_the_bits_that_it_is_told() -> None:
    rng = random.Random(1)
    for _ in range(50):
        layers, choices, activation = random_layers(rng), (2, 3, 4, 8), rng.choice((4, 8))
        sums = random_sums(rng, layers)
        budget = Budget.parse(f"{packed_size(layers, uniform(layers, 4), 40).total}B").beside(40, sums)
        left = budget.weights_limit(layers, choices, activation)
        for _ in range(20):
            bits = [rng.choice(choices) for _ in layers]
            if int(np.dot([layer.params for layer in layers], bits)) <= left:
                check_within(Allocation(tuple(bits), (activation,) * len(layers)), layers, budget)


def test_scales_and_biases_of_the_digits_network_weigh_nearly_as_much_as_three_bits(bench: Bench) -> None:
    size, full = bench.size(uniform(bench.layers, 3)), bench.size(None)
    assert size.weights == sum(-(-3 * x.params // x.out_channels // 8) * x.out_channels for x in bench.layers)
    assert size.scales == size.biases == 4 * sum(x.out_channels for x in bench.layers)
    assert 0.8 < (size.scales + size.biases) / size.weights < 0.95
    assert full.total == 4 * sum(parameter.numel() for parameter in fused(bench))
    assert 0.80 < 1 - size.total / full.total < 0.85


def fused(bench: Bench) -> list[Tensor]:
    """What inference reads of the digits network, batch normalization folded in."""
    return [each for module in bench.prepared.modules for each in (module.weight, module.bias) if each is not None]
