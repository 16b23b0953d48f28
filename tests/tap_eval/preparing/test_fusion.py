"""Branches for training become one layer, and nothing else changes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.fusion import fused


class Branches(nn.Module):
    """Two convolutions side by side, of which one is deployed; `fuse` is an attribute of many networks."""

    def __init__(self, error: float = 0.0) -> None:
        super().__init__()
        self.one, self.other, self.fuse, self.error = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.ReLU(), error

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.one(x) + self.other(x) if self.other else self.one(x))

    def switch_to_deploy(self, verbose: bool = False) -> None:
        self.one.weight += self.other.weight + self.error
        self.one.bias += self.other.bias
        self.other = None  # type: ignore[assignment]


class Replaced(Branches):
    def reparameterize(self) -> nn.Module:
        self.switch_to_deploy()
        return nn.Sequential(self.one, self.fuse)


class Failing(Branches):
    def switch_to_deploy(self, verbose: bool = False) -> None:
        raise ValueError("no")


IMAGES = torch.rand(2, 3, 64, 64)


@pytest.mark.parametrize("block", [Branches, Replaced])
@torch.no_grad()
def test_branches_are_fused_in_a_copy(block: type[Branches]) -> None:
    network = nn.Sequential(block(), nn.Flatten()).eval()
    deployed = fused(network, IMAGES)
    assert deployed is not None
    assert sum(isinstance(module, nn.Conv2d) for module in deployed.modules()) == 1
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 2
    torch.testing.assert_close(deployed(IMAGES), network(IMAGES))
    root = fused(network[0], IMAGES)
    assert root is not None
    torch.testing.assert_close(root(IMAGES), network[0](IMAGES))


@pytest.mark.parametrize(("block", "sentence"), [(Branches(0.1), "other outputs"), (Failing(), "ValueError: no")])
def test_what_cannot_be_fused_is_said(block: nn.Module, sentence: str) -> None:
    with pytest.raises(NetworkMistake, match=f"{sentence}.*fuse it first"):
        fused(block, IMAGES)


def test_most_networks_have_nothing_to_fuse() -> None:
    assert fused(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGES) is None


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8"])
@torch.no_grad()
def test_reparameterizable_networks_of_timm(name: str) -> None:
    network = timm.create_model(name, pretrained=False, num_classes=5).eval()
    deployed = fused(network, IMAGES[:1])
    assert deployed is not None
    before, after = network(IMAGES[:1]), deployed(IMAGES[:1])
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))
    assert len(list(deployed.modules())) < 0.6 * len(list(network.modules()))
