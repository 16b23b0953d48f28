"""What the controller learns, and what no generation can do to it."""

from __future__ import annotations

import math

import pytest

from graphs import controller
from graphs.controller import FLOOR, dpo, dpo_gradient, initial, paper, probabilities, ratio, uniform
from graphs.state import TEMPLATES, Template

DEAD = -math.inf


def beating(judged: list[tuple[Template, float]], to_beat: float = 0.0) -> list[tuple[Template, float, float]]:
    """Offspring that all had the same to beat."""
    return [(template, fitness, to_beat) for template, fitness in judged]


GENERATIONS: list[list[tuple[Template, float]]] = [
    [],
    [("mutation", 0.8), ("initialization", 0.4), ("crossover", 0.6)],
    [("mutation", DEAD), ("initialization", 0.4)],
    [("mutation", DEAD), ("initialization", DEAD), ("crossover", DEAD)],
    [("mutation", -0.3), ("initialization", -0.1), ("crossover", 0.0)],
    [("mutation", 0.5), ("mutation", 0.5), ("crossover", 0.5)],
    [("crossover", 0.9)],
    [("crossover", 1e-300), ("mutation", 1e300)],
]


@pytest.mark.parametrize("update", controller.UPDATES.values(), ids=controller.UPDATES.keys())
@pytest.mark.parametrize("judged", GENERATIONS)
def test_whatever_is_judged_probabilities_stay_a_distribution_above_the_floor(
    update: controller.Update, judged: list[tuple[Template, float]]
) -> None:
    weights: controller.Weights = initial()
    for _ in range(30):
        weights = update(weights, beating(judged))
    draw = probabilities(weights)
    assert sum(draw.values()) == pytest.approx(1)
    assert min(draw.values()) >= FLOOR


def test_the_rule_of_the_paper_is_equation_7_whatever_was_to_beat() -> None:
    judged: list[tuple[Template, float]] = [
        ("mutation", 0.9),
        ("mutation", 0.7),
        ("initialization", 0.4),
        ("crossover", 0.6),
    ]
    after = paper(initial(), beating(judged, 0.65))
    assert after == pytest.approx({"mutation": 0.8 / 1.8, "initialization": 0.4 / 1.8, "crossover": 0.6 / 1.8})


def test_the_ratio_rule_counts_the_ranks_of_gains_over_what_was_to_beat() -> None:
    judged: list[tuple[Template, float, float]] = [
        ("mutation", 0.801, 0.800),
        ("mutation", 0.809, 0.810),
        ("crossover", 0.810, 0.810),
        ("initialization", 0.790, 0.700),
    ]
    after = ratio(initial(), judged)  # credits 5/8, 1/8; 3/8; 7/8
    assert after == pytest.approx({"mutation": 3 / 13, "crossover": 3 / 13, "initialization": 7 / 13})
    assert dpo(initial(), judged)["initialization"] > 1 / 3 > dpo(initial(), judged)["mutation"]


def test_a_template_without_offspring_keeps_its_weight_beside_the_others() -> None:
    after = ratio(
        {"initialization": 0.2, "mutation": 0.5, "crossover": 0.3}, beating([("mutation", 0.7), ("mutation", 0.7)])
    )
    assert after == pytest.approx({"initialization": 0.2, "mutation": 0.5, "crossover": 0.3})


@pytest.mark.parametrize("update", [ratio, paper, dpo])
def test_dead_and_negative_offspring_count_against_their_template(update: controller.Update) -> None:
    for worse in (DEAD, -0.5):
        after = update(initial(), beating([("mutation", worse), ("crossover", 0.5), ("initialization", 0.5)]))
        assert after["mutation"] < after["crossover"] == pytest.approx(after["initialization"])


@pytest.mark.parametrize("update", [ratio, dpo, uniform])
def test_ties_and_generations_of_one_template_teach_nothing(update: controller.Update) -> None:
    weights = {"initialization": 0.2, "mutation": 0.5, "crossover": 0.3}
    for judged in ([("mutation", 0.5), ("crossover", 0.5)], [("mutation", 0.1), ("mutation", 0.9)], []):
        assert update(weights, beating(judged)) == pytest.approx(weights)  # type: ignore[arg-type]


def test_a_template_that_was_down_comes_back_within_a_run() -> None:
    weights: controller.Weights = initial()
    for _ in range(10):
        weights = ratio(weights, beating([("mutation", DEAD), ("crossover", 0.5), ("initialization", 0.5)]))
    for _ in range(4):
        weights = ratio(weights, beating([("mutation", 0.9), ("crossover", 0.3), ("initialization", 0.3)]))
    assert probabilities(weights)["mutation"] > 0.4


def test_the_dpo_step_goes_down_the_loss() -> None:
    judged: list[tuple[Template, float]] = [("mutation", 0.8), ("initialization", 0.4), ("crossover", 0.6)]
    after = dpo(initial(), beating(judged))
    assert after["mutation"] > after["crossover"] > after["initialization"]
    assert after["crossover"] ** 2 == pytest.approx(after["mutation"] * after["initialization"])


def test_the_dpo_gradient_is_that_of_the_loss() -> None:
    reference = {"initialization": 0.1, "mutation": -0.4, "crossover": 0.3}
    logits = {"initialization": 0.5, "mutation": -0.2, "crossover": 0.0}
    pairs: list[tuple[Template, Template]] = [("mutation", "crossover"), ("mutation", "initialization")]

    def loss(at: dict[str, float]) -> float:
        margins = [at[won] - at[lost] - reference[won] + reference[lost] for won, lost in pairs]
        return sum(math.log1p(math.exp(-controller.DPO_BETA * margin)) for margin in margins) / len(pairs)

    found = dpo_gradient(logits, reference, pairs)  # type: ignore[arg-type]
    for name in TEMPLATES:
        moved = loss(logits | {name: logits[name] + 1e-6}) - loss(logits | {name: logits[name] - 1e-6})
        assert found[name] == pytest.approx(moved / 2e-6, abs=1e-6)


def test_a_template_that_cannot_be_followed_is_never_drawn() -> None:
    draw = probabilities(initial(), ["initialization", "mutation"])
    assert draw == pytest.approx({"initialization": 0.5, "mutation": 0.5, "crossover": 0})
