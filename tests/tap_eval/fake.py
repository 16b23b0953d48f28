"""Tensors without values on a CUDA device that need not be there; what mixes devices fails as it would there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_ATEN = torch.ops.aten
CUDA = torch.device("cuda", 0)
NEEDS_BUILD = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch is built without CUDA")
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


class _Answering(TorchDispatchMode):
    """Takes real tensors for fake ones on the CPU, and has an answer where code asks a fake one for its value."""

    def __init__(self, fakes: FakeTensorMode, answer: bool) -> None:
        super().__init__()
        self._fakes = fakes
        self._answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_ATEN.equal.default, _ATEN.allclose.default):
            assert args[0].device == args[1].device
            return self._answer
        if func in (_ATEN._local_scalar_dense.default, _ATEN.item.default, _ATEN.is_nonzero.default):
            kind = args[0].dtype
            return self._answer if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        args, kwargs = tree_map_only(Tensor, self._faked, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _faked(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self._fakes.from_tensor(tensor)


@contextmanager
def fake_cuda(answer: bool = False) -> Iterator[None]:
    """Computes nothing; what is asked of a tensor is `answer`, or 1 of numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes, _Answering(fakes, answer):
        yield
