"""The operations of a network, counted where PyTorch computes them, whatever code leads there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ADDING = {torch.ops.aten.addmm, torch.ops.aten.baddbmm}
"""products whose factors come after what they are added to"""


class Operations(TorchDispatchMode):
    """Multiply-accumulates, by the formulas of `torch.utils.flop_counter`.

    `of_weights` are those of a factor that comes of tensors of the network alone with one that
    does not, `of_activations` those of two that do not.
    """

    def __init__(self, network: nn.Module, pixels: Tensor) -> None:
        super().__init__()
        self.of_weights = self.of_activations = 0
        self.paused = False
        held = [*network.parameters(), *network.buffers()]
        self._of_network = {StorageWeakRef(tensor.untyped_storage()) for tensor in held}
        self._of_image = {StorageWeakRef(pixels.untyped_storage())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        written += given[:1] if func._schema.is_mutable else []
        for kept in (self._of_network, self._of_image):
            if any(StorageWeakRef(tensor.untyped_storage()) in kept for tensor in given):
                kept |= {StorageWeakRef(tensor.untyped_storage()) for tensor in written}
        if func._overloadpacket in flop_registry and not self.paused:
            count = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result) // 2
            factors = given[-2:] if func._overloadpacket in _ADDING else given[:2]
            weights = sum(self._is_weight(factor) for factor in factors)
            self.of_weights += count if weights == 1 else 0
            self.of_activations += count if weights == 0 else 0
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        key = StorageWeakRef(tensor.untyped_storage())
        return key in self._of_network and key not in self._of_image

    def around(self, module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`module`, not counted."""

        def call(x: Tensor) -> Tensor:
            self.paused = True
            try:
                return module(x)
            finally:
                self.paused = False

        return call


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as the products that it is."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
