"""Of many expressions, a small model is offered those that promise most by what was measured."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import pdist

from agents.forecast import Forecast
from agents.prior import Powers, matrix
from prompts import grammar
from prompts.expression import BOOSTS, exponents, mutations, product
from tap_eval.measuring.bench import Bench
from tools.evaluation import Scored, score
from tools.sandbox import MontySandbox

LAYERS: list[dict[str, Any]] = [
    {"params": 4.0**place, "depth": place / 8, "weight_std": 4.0 ** (3 * place % 8), "out_channels": 1}
    for place in range(8)
]


def level(expressions: Sequence[Powers]) -> np.ndarray:
    """Foretells nothing."""
    return np.zeros(len(expressions))


def worth(expression: str) -> float:
    """Greatest for `params**-1 * weight_std**0.5`."""
    powers = exponents(expression)
    return -((powers.get("params", 0) + 1) ** 2) - (powers.get("weight_std", 0) - 0.5) ** 2


def test_what_is_promising_is_better_than_what_is_drawn() -> None:
    rng = random.Random(0)

    def drawn(count: int) -> list[str]:
        return [product({"params": rng.uniform(-2, 2), "weight_std": rng.uniform(-2, 2)}) for _ in range(count)]

    judged = {expression: worth(expression) for expression in drawn(20)}
    many = drawn(60)
    offered = Forecast([LAYERS], level).promising(many, judged, 3)
    ranks = sorted(many, key=worth, reverse=True)
    assert sum(ranks.index(each) for each in offered) / 3 < 8  # 30 by chance
    assert Forecast([LAYERS, LAYERS], level).promising(many, judged, 3) == offered


def test_what_was_judged_is_not_offered_again() -> None:
    judged = {f"params**{power}": power for power in (0.5, 1.5, 2, 2.5)}
    assert Forecast([LAYERS], level).promising([*judged, "depth"], judged, 3) == ["depth"]
    assert Forecast([LAYERS], level).promising(list(judged), judged, 2) == ["params**2.5", "params**2"]


@pytest.mark.parametrize(
    "judged", [{}, {"depth": 1.0}, dict.fromkeys(("depth", "params", "params**2", "depth**2"), 0.5)]
)
def test_where_nothing_is_known_a_hand_is_offered_all_the_same(judged: dict[str, float]) -> None:
    offered = Forecast([LAYERS], level).promising(["weight_std", "weight_std**-1", "params**0.5"], judged, 2)
    assert len(set(offered)) == 2


def test_alike_is_what_gives_like_scores(channel_bench: Bench, sandbox: MontySandbox) -> None:
    """Distances between expressions are those between the logarithms of the scores that their code gives."""
    rng = random.Random(1)
    names = [*grammar._METADATA, *grammar._STATISTICS]
    expressions = [f"exp(-2 * depth) * ({place + 2} if {boost} else 1) * params" for place, boost in enumerate(BOOSTS)]
    expressions += [each for each in mutations("macs**-0.5 * weight_l2", names, rng) if "channel" not in each]
    powers = [exponents(expression) for expression in expressions]
    keys = sorted({key for each in powers for key in each})
    points = matrix(powers, keys) @ Forecast([channel_bench.features], level)._axes(*keys)
    expected = []
    for expression in expressions:
        _, code = grammar.code_of(f'{{"thought": "T.", "expression": "{expression}"}}')
        scored = score(code, [channel_bench], sandbox)
        assert isinstance(scored, Scored)
        logarithms = np.log(scored.scores[0])
        expected.append((logarithms - logarithms.mean()) / math.sqrt(len(logarithms)))
    np.testing.assert_allclose(pdist(points), pdist(expected), atol=1e-9)
