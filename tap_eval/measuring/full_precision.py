"""A network's outputs in full precision, from which the divergence of quantized ones is measured."""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import Tensor

from tap_eval.kept import Kept
from tap_eval.measuring.job import SplitName
from tap_eval.measuring.ledger import Ledger


class FullPrecision:
    """Outputs of whole splits: computed once, by one process, and kept beside the rounded weights."""

    def __init__(
        self, ledger: Ledger, kept: Kept, name: Callable[[SplitName], str], compute: Callable[[SplitName], Tensor]
    ) -> None:
        """`name` tells what the outputs for a split depend on, and `compute` gives them, (N, classes) float32."""
        self._ledger = ledger
        self._kept = kept
        self._name = name
        self._compute = compute
        self._lock = threading.Lock()
        self._held: dict[SplitName, Tensor] = {}

    def __call__(self, split: SplitName) -> Tensor:
        """(N, classes), before softmax, in the order of the split."""
        with self._lock:
            if split not in self._held:
                name = self._name(split)
                self._ledger.recall(name, lambda: self._made(split, name))
                if split not in self._held:  # computed before; what was kept may be gone
                    found = self._kept.recall(name)
                    if found:
                        self._held[split] = found["logits"]
                    else:
                        self._made(split, name)
            return self._held[split]

    def _made(self, split: SplitName, name: str) -> list[int]:
        """The shape of what is computed and kept."""
        self._held[split] = self._compute(split)
        self._kept.keep(name, {"logits": self._held[split]})
        return list(self._held[split].shape)
