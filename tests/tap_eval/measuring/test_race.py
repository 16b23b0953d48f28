"""Who is dropped from a race, and that the best never is without cause."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tap_eval.measuring.accuracy import Measurement
from tap_eval.measuring.race import Entrant, Seen, estimated, race
from tap_eval.proxies.fitness import Worth

SIZES = [[37], [38], [75], [150], [300], [600], [1200]]
TOTAL = 2400


class Field:
    """Entrants of known accuracy on images of shared difficulty, whose outputs are as far off as they are wrong."""

    def __init__(self, accuracies: Sequence[float], seed: int, offsets: Sequence[float] | None = None) -> None:
        rng = np.random.default_rng(seed)
        ease = rng.random(TOTAL)
        answers = [ease + rng.normal(0, 0.1, TOTAL) < accuracy for accuracy in accuracies]
        hard = rng.gamma(1, size=TOTAL)
        far = [(hard * (1 - each) * rng.gamma(8, 1 / 8, TOTAL)).astype(np.float32) for each in accuracies]
        self.truth = [Measurement(*pair) for pair in zip(answers, far, strict=True)]
        self.entrants = [Entrant(offset) for offset in offsets or [0.0] * len(accuracies)]
        self.images = 0

    def seen(self, index: int, stage: int) -> Seen:
        start = sum(size for (size,) in SIZES[:stage])
        part = slice(start, start + SIZES[stage][0])
        return [Measurement(self.truth[index].correct[part], self.truth[index].kl[part])]

    def measure(self, which: Sequence[int], stage: int) -> list[Seen]:
        self.images += len(which) * SIZES[stage][0]
        return [self.seen(index, stage) for index in which]

    def run(
        self,
        keep: int = 2,
        error: float = 0.02,
        rivals: Sequence[Entrant] = (),
        weight: float = 0.9,
        worth: Worth = "accuracy",
    ) -> None:
        race(self.entrants, rivals, self.measure, SIZES, [0], keep, error, weight, worth)

    def dropped(self) -> list[int]:
        return [index for index, entrant in enumerate(self.entrants) if entrant.dropped]


def test_the_hopeless_are_dropped_early_and_the_best_are_measured_in_full() -> None:
    field = Field([0.85, 0.84, 0.3, 0.5, 0.2, 0.6], seed=0)
    field.run()
    assert field.dropped() == [2, 3, 4, 5]
    assert [len(entrant.so_far()[0]) for entrant in field.entrants] == [TOTAL, TOTAL, 150, 150, 150, 150]
    assert estimated(field.entrants[0], field.entrants[:2]) == (
        [field.truth[0].accuracy.top1],
        [field.truth[0].mean_kl],
    )


def test_without_error_or_with_few_entrants_nobody_is_dropped() -> None:
    for accuracies, error in (([0.9, 0.1, 0.1, 0.1], 0.0), ([0.9, 0.1], 0.02)):
        field = Field(accuracies, seed=0)
        field.run(error=error)
        assert field.dropped() == []
        assert field.images == TOTAL * len(accuracies)


def test_rivals_that_have_finished_count_as_better() -> None:
    field = Field([0.85, 0.84, 0.6], seed=1)
    rivals = [Entrant(0.0, [field.seen(index, stage) for stage in range(len(SIZES))]) for index in (0, 1)]
    field.entrants = field.entrants[2:]
    field.truth = field.truth[2:]
    field.run(rivals=rivals)
    assert field.dropped() == [0]


def test_the_rest_of_fitness_counts_too() -> None:
    field = Field([0.8, 0.8, 0.8], seed=2, offsets=[0.0, 0.5, 0.5])
    field.run()
    assert field.dropped() == [0]


@pytest.mark.parametrize("worth", ["accuracy", "kl"])
@pytest.mark.parametrize("error", [0.02, 0.1])
def test_the_best_is_dropped_no_more_often_than_the_error_says(error: float, worth: Worth) -> None:
    races, wrong, images = 200, 0, 0
    for seed in range(races):
        field = Field(np.linspace(0.7, 0.85, 8), seed=seed)
        field.run(error=error, worth=worth)
        worths = [truth.accuracy.top1 if worth == "accuracy" else -truth.mean_kl for truth in field.truth]
        wrong += field.entrants[int(np.argmax(worths))].dropped
        images += field.images
    assert wrong / races <= error
    assert images < 0.7 * races * 8 * TOTAL


def test_divergence_drops_on_fewer_images_than_accuracy_and_estimates_what_it_has_not_seen() -> None:
    images = {}
    for worth in ("accuracy", "kl"):
        field = Field(np.linspace(0.78, 0.85, 8), seed=0)
        field.run(error=0.1, worth=worth)  # type: ignore[arg-type]
        images[worth] = field.images
        assert not field.entrants[-1].dropped
    assert images["kl"] < 0.9 * images["accuracy"]
    finished = [entrant for entrant in field.entrants if not entrant.dropped]
    for truth, entrant in zip(field.truth, field.entrants, strict=True):
        (top1,), (kl,) = estimated(entrant, finished)
        tolerance = 0 if not entrant.dropped else 0.1
        assert kl == pytest.approx(truth.mean_kl, rel=4 * tolerance)
        assert top1 == pytest.approx(truth.accuracy.top1, abs=tolerance)
