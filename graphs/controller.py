"""The controller: how likely each template is, learned from what its offspring are worth.

Weights are relative and sum to one; `probabilities` mixes in a floor, so that no template
is ever lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Literal

from graphs.state import TEMPLATES, Template

Controller = Literal["ratio", "paper", "dpo", "uniform"]
Weights = Mapping[Template, float]
Judged = Sequence[tuple[Template, float, float]]
"""A generation's offspring: the template of each, its fitness, minus infinity for the dead, and what it had to beat:
the fitness of its better parent, or the library's median where it has none."""

FLOOR = 0.05
DPO_BETA = 1.0
DPO_STEP = 2.0


def initial() -> dict[Template, float]:
    """Uniform weights."""
    return {template: 1 / len(TEMPLATES) for template in TEMPLATES}


def probabilities(weights: Weights, feasible: Sequence[Template] = TEMPLATES) -> dict[Template, float]:
    """Eq. 8 with a floor; templates that are not `feasible` have probability 0."""
    total = sum(weights[template] for template in feasible)
    return {
        template: FLOOR + (1 - FLOOR * len(feasible)) * weights[template] / total if template in feasible else 0.0
        for template in TEMPLATES
    }


def ratio(weights: Weights, judged: Judged) -> dict[Template, float]:
    """Eq. 7 with ranks in place of fitness, which in a generation of good proxies differs by a few per cent.

    An offspring's credit is the share of its generation that gained less over what it had to beat than it did, with
    half of those that gained as much; the dead get none.
    """
    gains = [fitness - to_beat for _, fitness, to_beat in judged]
    ranks = [sum((each < gain) + (each == gain) / 2 for each in gains) / len(gains) for gain in gains]
    credits = [0.0 if gain == -math.inf else rank for gain, rank in zip(gains, ranks, strict=True)]
    return _multiplied(weights, [(template, credit) for (template, _, _), credit in zip(judged, credits, strict=True)])


def paper(weights: Weights, judged: Judged) -> dict[Template, float]:
    """Eq. 7 in the paper's words, with fitness as it is.

    Negative fitness and the dead count 0, so that weights stay positive and templates whose code does not run lose.
    """
    return _multiplied(weights, [(template, max(fitness, 0.0)) for template, fitness, _ in judged])


def _multiplied(weights: Weights, credits: Sequence[tuple[Template, float]]) -> dict[Template, float]:
    """`w_i <- w_i * alpha * Fitness(T_i) / mu`.

    `Fitness(T_i)` is the mean over the template's offspring, of numbers that are not negative.
    `mu` is the mean over the templates that had offspring; the others keep their weight.
    `alpha` is common to all and cancels in Eq. 8, so it does not appear.
    """
    values: dict[Template, list[float]] = {}
    for template, credit in credits:
        values.setdefault(template, []).append(credit)
    means = {template: sum(its) / len(its) for template, its in values.items()}
    mu = sum(means.values()) / len(means) if means else 0.0
    if mu <= 0:
        return dict(weights)
    return _normalized({template: weights[template] * means.get(template, mu) / mu for template in TEMPLATES})


def dpo(weights: Weights, judged: Judged) -> dict[Template, float]:
    """One gradient step of the DPO loss on the logits of the template distribution (Rafailov et al. 2024, Eq. 7).

    The preference pairs are all pairs of the generation's offspring with different gains over
    what each had to beat, and different templates; the reference is the distribution that drew them. At the
    reference the implicit reward margin is 0, so each pair pulls its winner's logit up and
    its loser's down by `beta * sigmoid(0)`, averaged over the pairs.
    """
    pairs: list[tuple[Template, Template]] = []
    gains = [(template, fitness - to_beat) for template, fitness, to_beat in judged]
    for (one, gain), (other, its_gain) in combinations(gains, 2):
        if one != other and gain != its_gain:
            pairs.append((one, other) if gain > its_gain else (other, one))
    if not pairs:
        return dict(weights)
    reference = {template: math.log(max(weights[template], 1e-12)) for template in TEMPLATES}
    gradient = dpo_gradient(reference, reference, pairs)
    return _normalized(
        {template: math.exp(reference[template] - DPO_STEP * gradient[template]) for template in TEMPLATES}
    )


def dpo_gradient(
    logits: Weights, reference: Weights, pairs: Sequence[tuple[Template, Template]]
) -> dict[Template, float]:
    """Gradient of `-mean log sigmoid(beta * margin)` over (winner, loser) pairs, by the logits.

    For a softmax, `log pi(w) - log pi(l)` is the difference of the logits, so the margin is
    `(logits_w - logits_l) - (reference_w - reference_l)`.
    """
    gradient = dict.fromkeys(TEMPLATES, 0.0)
    for winner, loser in pairs:
        margin = (logits[winner] - logits[loser]) - (reference[winner] - reference[loser])
        pull = DPO_BETA / (1 + math.exp(DPO_BETA * margin)) / len(pairs)
        gradient[winner] -= pull
        gradient[loser] += pull
    return gradient


def uniform(weights: Weights, judged: Judged) -> dict[Template, float]:
    """Nothing is learned: the ablation."""
    return dict(weights)


Update = Callable[[Weights, Judged], dict[Template, float]]
UPDATES: dict[Controller, Update] = {
    "ratio": ratio,
    "paper": paper,
    "dpo": dpo,
    "uniform": uniform,
}


def _normalized(weights: Weights) -> dict[Template, float]:
    """Sums to one; a weight near zero, from which a few updates could not bring it back, is raised to the floor."""
    kept = {template: max(weight, FLOOR) for template, weight in weights.items()}
    total = sum(kept.values())
    return {template: weight / total for template, weight in kept.items()}
