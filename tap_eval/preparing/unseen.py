"""Weights that a network reads where it is not watched: outside of its modules, or outside of PyTorch's functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tap_eval.preparing.equivalence import TOLERANCE
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.tracing import Call, Watching

UNSEEN = "code that cannot be watched"
"""reads a tensor that no function of PyTorch's was seen to read: NumPy, a scripted function, `vmap`, Python numbers"""


def outside(run: Callable[[Tensor], Any], batches: Sequence[Tensor], named: Iterable[int]) -> dict[int, Tensor]:
    """Tensors, by their `id`, that every pass reads but none makes, and that are not `named`: globals, those of plain
    objects and of modules in plain lists, and what a cache keeps."""
    passes: list[dict[int, Tensor]] = []
    for batch in batches:
        with _Strangers({*named, id(batch)}) as strangers:
            run(batch)
        passes.append(strangers.met)
    return {key: tensor for key, tensor in passes[0].items() if all(key in each for each in passes[1:])}


class _Strangers(Watching):
    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known = known
        self.met: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call.of(func, args, kwargs or {})
        self.met |= {id(tensor): tensor for tensor in call.read if id(tensor) not in self._known}
        result = call()
        self._known |= {id(tensor) for tensor in tree_leaves(result) if isinstance(tensor, Tensor)}
        return result


def read_unseen(prepared: Prepared, names: Sequence[str], batches: Sequence[tuple[Tensor, Tensor]]) -> set[str]:
    """Of the network's tensors called `names`, those on which its logits depend although layers have their own weights.

    `batches` are images with their logits. The tensors are overwritten meanwhile.
    """
    state = {**dict(prepared.network.named_parameters()), **dict(prepared.network.named_buffers())}
    modules = [copy.deepcopy(module) for module in prepared.modules]

    def run(names: Sequence[str], pixels: Tensor) -> Tensor | None:
        """The logits without these tensors; None where code looks at them and stops."""
        tensors = [state[name] for name in names]
        values = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = torch.full_like(tensor, math.nan)
            return prepared(pixels, modules)
        except Exception:  # noqa: BLE001 the network's code is the user's: whatever it raises, it has read them
            return None
        finally:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.data = value

    def among(names: Sequence[str], pixels: Tensor, logits: Tensor) -> set[str]:
        found = run(names, pixels)
        if found is not None and torch.equal(found, logits):
            return set()
        if len(names) == 1:
            return set(names)
        middle = len(names) // 2
        return among(names[:middle], pixels, logits) | among(names[middle:], pixels, logits)

    unseen: set[str] = set()
    for pixels, logits in batches:
        found = run(names, pixels)
        if found is None or not torch.allclose(found, logits, rtol=0, atol=TOLERANCE * float(logits.abs().max())):
            unseen |= among(names, pixels, prepared(pixels, modules))
    return unseen


def shown(tensors: Sequence[Tensor]) -> str:
    """Their shapes."""
    words = [" x ".join(map(str, tensor.shape)) for tensor in tensors]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")
