"""Networks that train with parallel branches and are deployed without, as RepVGG and MobileOne."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.copying import copy_of

_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
_TOLERANCE = 1e-4
"""difference of an output, in parts of the greatest"""


@torch.no_grad()
def fused(network: nn.Module, images: Tensor) -> nn.Module | None:
    """A copy of `network` in eval mode in which modules have become what they are deployed as; None where none does.

    That is told by a method without arguments called `fuse`, `reparameterize` or
    `switch_to_deploy`, outer modules first. The copy gives the same outputs on random images
    of the size of `images`, (N, C, H, W). Raises `NetworkMistake` where a method fails or
    changes the outputs.
    """
    if not any(_method(module) for module in network.modules()):
        return None
    holder = nn.Sequential(copy_of(network).eval())
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    before = tree_leaves(holder(noise))
    kind = type(network).__name__
    try:
        _fuse(holder)
        after = tree_leaves(holder(noise))
        worst = max(_difference(old, new) for old, new in zip(before, after, strict=True))
    except Exception as error:  # the methods are the user's code: whatever they raise is the user's to see
        raise NetworkMistake(
            f"{kind} has branches to be fused, but that fails ({type(error).__name__}: {error}): fuse it first, in "
            "the factory, for instance with timm.utils.reparameterize_model(network.eval())."
        ) from error
    if not worst <= _TOLERANCE:
        raise NetworkMistake(
            f"{kind} gives other outputs once its branches are fused by its own methods, by {worst:.2g} of the "
            "greatest: fuse it first, in the factory, and see that its accuracy stays."
        )
    result: nn.Module = holder[0]
    return result


def _fuse(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        if method := _method(child):
            made = getattr(child, method)()
            if isinstance(made, nn.Module):
                setattr(parent, name, made)
        _fuse(parent.get_submodule(name))


def _method(module: nn.Module) -> str | None:
    """The method by which it fuses itself; layers that are called so are none."""
    for name in _METHODS:
        method = getattr(type(module), name, None)
        if callable(method):
            needed = list(inspect.signature(method).parameters.values())[1:]
            if all(
                each.default is not each.empty or each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
                for each in needed
            ):
                return name
    return None


def _difference(old: object, new: object) -> float:
    """Of an output, in parts of its greatest value."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return 0.0
    return float((old - new).abs().max() / old.abs().max().clamp_min(1e-12))
