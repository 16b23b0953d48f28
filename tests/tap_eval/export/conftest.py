"""The networks of `cases`, prepared once, and the file of one of them."""

from __future__ import annotations

import onnx
import pytest
import torch

from tap_eval.allocation.choices import uniform
from tap_eval.export.onnx import onnx_model
from tap_eval.quantization.quantizer import Allocation
from tests.tap_eval.export.cases import NETWORKS, Case


@pytest.fixture(scope="package")
def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    return {name: make() for name, make in NETWORKS.items()}


@pytest.fixture(scope="package")
def right(cases: dict[str, Case]) -> tuple[Case, Allocation, onnx.ModelProto]:
    given = cases["straight"]
    allocation = uniform(given.prepared.layers, 4)
    return given, allocation, onnx_model(given.at(allocation), allocation, given.pixels, {})
