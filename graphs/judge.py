"""The judge: what a generation's candidates are worth, by Eq. 6 and a race on the search split."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphs.state import Candidate, by_proposal
from tap_eval.allocation.choices import uniform
from tap_eval.allocation.size import bops
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.race import Entrant, Seen, estimated, image_sets, race
from tap_eval.measuring.stages import STAGES
from tap_eval.proxies.fitness import FitnessWeights, cost, novelty, rank_correlation
from tap_eval.proxies.proxy import Failure
from tools.evaluation import foretellings


@dataclass(frozen=True)
class Judge:
    """Fitness over a benchmark set."""

    benches: Sequence[Bench]
    weights: FitnessWeights
    racing: float = 0.0
    """error rate with which a candidate may be dropped before all images are seen; 0 measures on all"""

    def judge(
        self, names: Sequence[str], everyone: Mapping[str, Candidate], library: Sequence[str]
    ) -> dict[str, Candidate]:
        """The named candidates of `everyone` with their fitness.

        A duplicate within the generation dies, the first lives; drafts come after what was submitted. The others race
        for the first place, and the members of the library that have run all stages are rivals; or nothing is measured
        of them, where it is by allocations measured before that they are judged.
        """
        proposed = sorted(
            (everyone[name] for name in names), key=lambda each: (bool(each.draft_of), by_proposal(each.name))
        )
        judged = self._without_twins(proposed)
        living = [candidate for candidate in judged.values() if candidate.failure is None]
        before = [candidate.scores for name, candidate in everyone.items() if name not in names and candidate.scores]
        offsets: list[float] = []
        for candidate in living:
            offsets.append(self._offset(candidate, before))
            before.append(candidate.scores)
        found = (
            [{"foretelling": foretellings(candidate.scores, self.benches)} for candidate in living]
            if self.weights.worth == "benchmark"
            else self._raced(living, offsets, [everyone[name] for name in library if not everyone[name].dropped])
        )
        for candidate, offset, figures in zip(living, offsets, found, strict=True):
            its = candidate.model_copy(update={"rho": self._rho(candidate), **figures})
            judged[candidate.name] = its.model_copy(update={"fitness": offset + self._worth(its)})
        return judged

    def _raced(
        self, living: Sequence[Candidate], offsets: Sequence[float], finished: Sequence[Candidate]
    ) -> list[dict[str, Any]]:
        """What images say of each, against those that have `finished`; `offsets` are of their fitness."""
        entrants = [Entrant(offset) for offset in offsets]
        rivals = [self._finished(candidate) for candidate in finished]
        seconds = [0.0] * len(living)

        def measure(which: Sequence[int], stage: int) -> list[Seen]:
            started = time.perf_counter()
            networks = [
                bench.seen_all([living[index].allocations[place].allocation() for index in which], stage)
                for place, bench in enumerate(self.benches)
            ]
            for index in which:
                seconds[index] += (time.perf_counter() - started) / len(which)
            return [list(of_one) for of_one in zip(*networks, strict=True)]

        race(
            entrants,
            rivals,
            measure,
            [[len(bench.stages[stage]) for bench in self.benches] for stage in range(len(STAGES))],
            image_sets([bench.splits.search for bench in self.benches]),
            keep=1,
            error=self.racing,
            weight=self.weights.share,
            worth=self.weights.worth,
        )
        whole = [*rivals, *(entrant for entrant in entrants if not entrant.dropped)]
        return [
            {
                **dict(zip(("top1", "kl"), estimated(entrant, whole), strict=True)),
                "images": [len(each) for each in entrant.so_far()],
                "dropped": entrant.dropped,
                "seconds": candidate.seconds + spent,
            }
            for candidate, entrant, spent in zip(living, entrants, seconds, strict=True)
        ]

    @staticmethod
    def _without_twins(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
        judged: dict[str, Candidate] = {}
        known: dict[str, str] = {}
        for candidate in candidates:
            twin = next((known[fingerprint] for fingerprint in candidate.prints if fingerprint in known), None)
            if twin and candidate.failure is None:
                message = f"it gives the same result as {twin} of the same generation."
                candidate = candidate.model_copy(update={"failure": str(Failure.DUPLICATE), "message": message})
            elif candidate.failure is None:
                known |= dict.fromkeys(candidate.prints, candidate.name)
            judged[candidate.name] = candidate
        return judged

    def _finished(self, candidate: Candidate) -> Entrant:
        """A candidate that has run all stages; what they showed is recalled."""
        pairs = list(zip(self.benches, candidate.allocations, strict=True))
        seen = [[bench.seen(bits.allocation(), stage) for bench, bits in pairs] for stage in range(len(STAGES))]
        return Entrant(candidate.value - self._worth(candidate), seen)

    def _worth(self, candidate: Candidate) -> float:
        return self.weights.worth_term(candidate.top1, candidate.kl, candidate.foretelling)

    def _rho(self, candidate: Candidate) -> list[float]:
        pairs = zip(candidate.scores, self.benches, strict=True)
        return [rank_correlation(scores, bench.layer_errors) for scores, bench in pairs]

    def _offset(self, candidate: Candidate, before: Sequence[list[list[float]]]) -> float:
        """The candidate's fitness without the worth of its allocations."""
        return self.weights.offset(
            self._rho(candidate),
            cost=self._cost(candidate) if self.weights.beta else 0.0,
            novelty=novelty(candidate.scores, before) if self.weights.gamma else 0.0,
        )

    def _cost(self, candidate: Candidate) -> float:
        pairs = list(zip(candidate.allocations, self.benches, strict=True))
        return cost(
            [bops(bench.layers, bits.allocation()) for bits, bench in pairs],
            [
                bops(bench.layers, uniform(bench.layers, max(choices.weights), max(choices.activations)))
                for bench in self.benches
                for choices in [bench.task.choices]
            ],
        )
