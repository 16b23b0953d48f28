"""Every product with weights is a layer, however it is written, and costs what it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from tap_eval.mistake import NetworkMistake
from tap_eval.networks.resnet import CifarResNet
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization.calibration import calibrate
from tests.tap_eval.preparing.networks import IMAGES, TOKENS, Net, assert_all_run_quantized, checked, randomized


@pytest.mark.parametrize(
    ("make", "size", "layers", "folded"),
    [
        (lambda: CifarResNet(20), 32, 20, 19),
        (lambda: models.resnet18(num_classes=10), 64, 21, 20),
        (lambda: models.mobilenet_v2(num_classes=10), 64, 53, 52),
        (lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), 32, 10, 0),
        (lambda: models.swin_t(num_classes=10), 64, 53, 0),
        (lambda: models.swin_v2_t(num_classes=10), 64, 53, 0),
    ],
    ids=["resnet20", "resnet18", "mobilenet_v2", "vit", "swin_t", "swin_v2_t"],
)
def test_networks_of_every_family_are_prepared(
    make: Callable[[], nn.Module], size: int, layers: int, folded: int
) -> None:
    network = make()
    prepared = checked(network, size)
    names = [layer.name for layer in prepared.layers]
    assert len(names) == len(set(names)) == layers
    assert set(names) <= {name for name, _ in network.named_modules()} | {
        name.removesuffix("_weight") for name, _ in network.named_parameters()
    }
    assert [layer.index for layer in prepared.layers] == list(range(layers))
    assert len(prepared.folded) == folded


def test_resnet20_has_the_published_counts() -> None:
    layers = prepare(CifarResNet(20), torch.rand(2, 3, 32, 32)).layers
    assert sum(layer.params for layer in layers) == 268_336
    assert sum(layer.macs for layer in layers) == 40_551_040
    assert (layers[0].first, layers[-1].last, layers[-1].kind) == (True, True, "linear")


@pytest.mark.parametrize(("case", "tokens"), [*((case, False) for case in IMAGES), *((case, True) for case in TOKENS)])
def test_every_product_with_weights_is_a_layer_however_it_is_written(case: str, tokens: bool) -> None:
    make, names = (IMAGES | TOKENS)[case]
    torch.manual_seed(0)
    network = Net(make(), 8, tokens)
    prepared = checked(network)
    expected = [f"body.{name}".removesuffix(".") for name in names]
    assert [layer.name for layer in prepared.layers] == [*(["tokens"] if tokens else []), *expected, "head"]
    weights = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    assert sum(layer.params for layer in prepared.layers) == weights
    assert_all_run_quantized(prepared)


def test_a_layer_with_several_names_calls_and_sizes_is_one_layer() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
            self.again = self.shared
            self.tied = nn.Conv2d(3, 3, 3, padding=1)
            self.tied.weight = self.shared.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(F.avg_pool2d(self.other(self.shared(x)), 2))
            return self.tied(F.avg_pool2d(x, 2)).mean((2, 3))

    prepared = prepare(Pyramid(), torch.rand(2, 3, 16, 16))
    shared, other = prepared.layers
    assert {(rest.name, rest.reason) for rest in prepared.rest} == {("shared.bias", "add"), ("tied.bias", "add")}
    assert (shared.name, shared.first, other.last) == ("shared", True, True)
    assert shared.macs == 3 * 3 * 9 * (16 * 16 + 8 * 8 + 4 * 4)


def test_patches_folded_into_the_batch_count() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            patches = x.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
            return self.linear(self.conv(patches).mean((2, 3))).view(len(x), 16, 3).mean(1)

    conv, linear = prepare(Patches(), torch.rand(2, 3, 16, 16)).layers
    assert (conv.macs, linear.macs, linear.tokens) == (3 * 8 * 9 * 256, 8 * 3 * 16, 16)


def test_layers_that_only_some_images_reach_are_found_and_observed() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.dark, self.bright = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x)).mean((2, 3))
            return torch.stack(
                [(self.bright if image.mean() > 5 else self.dark)(row) for image, row in zip(x, y, strict=True)]
            )

    torch.manual_seed(0)
    network = randomized(Gated())
    dark, bright = torch.rand(2, 3, 8, 8), torch.rand(3, 3, 8, 8) + 10
    prepared = prepare(network, dark, [torch.cat([dark, bright])])
    assert [layer.name for layer in prepared.layers] == ["conv", "dark", "bright"]
    seen = calibrate(prepared, dark)
    assert seen[2].high > seen[1].high
    unmet = prepare(network, dark)
    with pytest.raises(NetworkMistake, match=r"reaches the weights of bright.weight.*more calibration images"):
        unmet(bright)


def test_a_layer_that_only_random_images_reach_is_observed_on_them() -> None:
    class Spiky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.usual, self.rare = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.usual if bool((x[:, :, 0, 0] == x[:, :, -1, -1]).all()) else self.rare)(x.mean((2, 3)))

    flat = torch.rand(2, 3, 1, 1).expand(2, 3, 8, 8).contiguous()
    prepared = prepare(Spiky(), flat)
    assert [layer.name for layer in prepared.layers] == ["usual", "rare"]
    assert len(calibrate(prepared, flat)) == 2
