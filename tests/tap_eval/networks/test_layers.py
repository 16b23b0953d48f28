"""Networks of every kind are prepared without changing what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models

from tap_eval.mistake import NetworkMistake
from tap_eval.networks.prepare import prepare
from tap_eval.networks.resnet import CifarResNet


def randomized(network: nn.Module) -> nn.Module:
    """With statistics in BatchNorm that are not the initial ones."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


@pytest.mark.parametrize(
    ("network", "size", "layers"),
    [
        (CifarResNet(20), 32, 20),
        (models.resnet18(num_classes=10), 64, 21),
        (models.mobilenet_v2(num_classes=10), 64, 53),
        (models.vit_b_16(num_classes=10, image_size=32), 32, 50),
        (models.swin_t(num_classes=10), 64, 53),
        (models.swin_v2_t(num_classes=10), 64, 77),
    ],
    ids=["resnet20", "resnet18", "mobilenet_v2", "vit_b_16", "swin_t", "swin_v2_t"],
)
def test_a_prepared_network_computes_the_same_and_has_all_its_layers(
    network: nn.Module, size: int, layers: int
) -> None:
    x = torch.rand(2, 3, size, size)
    randomized(network)
    prepared = prepare(network, x)
    with torch.no_grad():
        assert torch.allclose(prepared(x), network(x), atol=1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared.network.modules())
    names = [layer.name for layer in prepared.layers]
    assert len(names) == len(set(names)) == layers
    assert [layer.index for layer in prepared.layers] == list(range(layers))


def test_resnet20_has_the_published_counts() -> None:
    layers = prepare(CifarResNet(20), torch.rand(2, 3, 32, 32)).layers
    assert sum(layer.params for layer in layers) == 268_336
    assert sum(layer.macs for layer in layers) == 40_551_040
    assert (layers[0].first, layers[-1].last, layers[-1].kind) == (True, True, "linear")


def test_a_convolution_that_others_read_too_keeps_its_norm() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    network = randomized(Shared())
    x = torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        assert torch.allclose(prepare(network, x).network(x), network(x), atol=1e-5)


def test_a_layer_called_on_two_sizes_costs_what_both_calls_cost_and_stands_where_it_runs_first() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(nn.functional.avg_pool2d(self.other(self.shared(x)), 2))

    shared, other = prepare(Pyramid(), torch.rand(2, 3, 16, 16)).layers
    assert (shared.name, shared.first, other.last) == ("shared", True, True)
    assert shared.macs == 3 * 3 * 9 * (16 * 16 + 8 * 8)


class PaddedLikeTensorFlow(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Doubled(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_of_its_own_is_taken_for_what_it_does() -> None:
    network = nn.Sequential(
        PaddedLikeTensorFlow(3, 4, 3, stride=2), nn.BatchNorm2d(4), Standardized(4, 4, 3, padding=1, bias=False)
    )
    randomized(network)
    x = torch.rand(2, 3, 8, 8)
    prepared = prepare(network, x)
    with torch.no_grad():
        assert torch.allclose(prepared(x), network(x), atol=1e-5)
    assert [layer.name for layer in prepared.layers] == ["0.layer", "2"]
    with pytest.raises(NetworkMistake, match="0 is a Doubled with a forward of its own"):
        prepare(nn.Sequential(Doubled(3, 4, 3)), x)


def test_what_cannot_be_prepared_is_said() -> None:
    with pytest.raises(NetworkMistake, match="no Conv2d and no Linear"):
        prepare(nn.Flatten(), torch.rand(2, 3, 4, 4))
    with pytest.raises(NetworkMistake, match=r"does not run on images of shape \(2, 1, 8, 8\)"):
        prepare(CifarResNet(20), torch.rand(2, 1, 8, 8))
