"""What is foretold of expressions, against what their code comes to."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import spearmanr

from agents.prior import Prior
from prompts import grammar
from prompts.expression import exponents, mutations
from tap_eval.allocation.budget import Budget
from tap_eval.measuring.bench import Bench
from tap_eval.proxies.fitness import FitnessWeights
from tap_eval.quantization.quantizer import Allocation
from tools.evaluation import Scored, measure, score
from tools.sandbox import MontySandbox

NAMES = [*grammar._METADATA, *grammar._STATISTICS, *grammar._OF_CHANNELS]


def judged(expression: str, benches: list[Bench], sandbox: MontySandbox) -> Scored:
    _, code = grammar.code_of(f'{{"thought": "T.", "expression": "{expression}"}}')
    scored = score(code, benches, sandbox)
    assert isinstance(scored, Scored)
    return scored


def left(allocation: Allocation, bench: Bench) -> float:
    """The layer errors, of which each falls fourfold a bit, in the sum."""
    lowest = 4.0 ** -min(bench.task.choices.weights)
    return sum(
        error
        * float(np.mean([4.0**-each + 4.0**-8 for each in (bits if isinstance(bits, tuple) else (bits,))]))
        / lowest
        for error, bits in zip(bench.layer_errors, allocation.weights, strict=True)
    )


def test_fitness_is_foretold_as_the_allocator_would_have_it(channel_bench: Bench, sandbox: MontySandbox) -> None:
    benches = [channel_bench, channel_bench.at(Budget.parse("4bit"))]
    weights = FitnessWeights(0.3, worth="kl")
    start = "params**-0.5 * weight_std**0.5 * (2.00 if first else 1) * channel.weight_l2**0.5"
    expressions = [start, *mutations(start, NAMES, random.Random(0))[:40]]
    expected = []
    for each in expressions:
        scored = judged(each, benches, sandbox)
        rho = measure(scored, benches).rho
        losses = [left(allocation, bench) for allocation, bench in zip(scored.allocations, benches, strict=True)]
        expected.append(0.3 * np.mean(rho) + 0.7 * np.mean(np.exp(-np.array(losses))))
    found = Prior(benches, weights)([exponents(each) for each in expressions])
    np.testing.assert_allclose(found, expected, atol=0.03)  # four layers, of which one may be in between
    assert spearmanr(found, expected)[0] > 0.97
    single = Prior(benches, weights)([exponents(start)])
    assert single[0] == pytest.approx(found[0])
