"""HAWQ-V3: the perturbations of HAWQ-V2 in an integer programme, which the budget limits.

The paper limits size, bit operations or latency; here it is whatever the budget is about. Without a second limit the
programme has the optimum that HAWQ-V2's row has from the exact allocator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from tap_eval.baselines.hawq_v2 import perturbations
from tap_eval.baselines.rule import Effort, Found, Rule, by_losses
from tap_eval.measuring.bench import Bench
from tap_eval.mistake import BudgetMistake
from tap_eval.quantization.quantizer import Allocation

_NODES = 10**5
"""of the solver's search, after which the best so far is taken"""
_SCALE = 1e6
"""of the largest loss: the solver takes sums that differ by a millionth for equal"""
_TRIES = 20
_OPTIMAL = 0
"""what the solver says of a solution that is known for the least"""


def programme(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], limit: int) -> tuple[list[int], bool]:
    """The choice of each layer, of least sum of `losses`, of which the sum of `costs` is within `limit`.

    And whether that sum is known for the least, as it is not where the solver gave up.
    The solver holds the limit to a tolerance; where what it finds is above, it is asked again without these choices.
    Raises `BudgetMistake` where nothing is found.
    """
    owner = np.concatenate([[layer] * len(each) for layer, each in enumerate(losses)])
    each_one = (owner == np.arange(len(losses))[:, None]).astype(float)
    loss, cost = np.concatenate(losses), np.concatenate(costs)
    limits = [LinearConstraint(each_one, 1, 1), LinearConstraint(cost / cost.max(), ub=limit / cost.max())]
    for _ in range(_TRIES):
        found = milp(
            loss * _SCALE / (loss.max() or 1.0),
            integrality=np.ones(len(loss)),
            bounds=Bounds(0, 1),
            constraints=limits,
            options={"node_limit": _NODES, "mip_rel_gap": 0},
        )
        if found.x is None:
            break
        taken = np.flatnonzero(found.x > 0.5)
        if cost[taken].sum() <= limit:
            choices = [int(place) - int(np.argmax(owner == owner[place])) for place in taken]
            return choices, found.status == _OPTIMAL
        limits.append(LinearConstraint((found.x > 0.5).astype(float), ub=len(losses) - 1))
    raise BudgetMistake("the integer programme of HAWQ-V3 finds no bits within the budget: leave hawq_v3 out.")


def _find(bench: Bench, effort: Effort) -> Found:
    losses, cost, note = perturbations(bench, effort)
    loss, layers, budget = by_losses(losses), bench.layers, bench.task.budget
    options = [budget.options(layer, bench.task.choices) for layer in layers]
    taken, least = programme(
        [[loss(place, *bits) for bits in each] for place, each in enumerate(options)],
        [
            [budget.cost(layer, *bits) + budget.range_cost(layer, bits[1]) for bits in each]
            for layer, each in zip(layers, options, strict=True)
        ],
        budget.limit(layers),
    )
    allocation = Allocation(*zip(*(each[place] for each, place in zip(options, taken, strict=True)), strict=True))
    gave_up = "" if least else f"the best that the solver found in {_NODES:,} nodes"
    return Found((allocation,), cost, "; ".join(filter(None, [note, gave_up])))


RULE = Rule(
    "HAWQ-V3", "as HAWQ-V2, by integer programming", "Yao et al. 2021, arXiv:2011.10680",
    ("weights", "images", "labels", "Hessian"), _find,
)  # fmt: skip
