"""A file that is not right is found out, and the first layer that differs is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tap_eval.export.checking import check
from tap_eval.mistake import ExportMistake
from tap_eval.quantization.quantizer import Allocation
from tests.tap_eval.export.cases import Case


def _bit(array: np.ndarray) -> None:
    array.flat[1] ^= 4


def _more(array: np.ndarray) -> None:
    array *= np.asarray(1.01, array.dtype)


def _another(array: np.ndarray) -> None:
    array += np.ones_like(array)


FAULTS: dict[str, tuple[str, Callable[[np.ndarray], None], str]] = {
    "an integer": ("deep.weight_packed_4", _bit, "group"),
    "a scale of weights": ("group.weight_scale", _more, "group"),
    "a scale of inputs": ("wide.input_scale", _more, "wide"),
    "a whole bias": ("group.corrected_bias_int32", _another, "group"),
    "a bias in float": ("last.corrected_bias", _more, "head"),
    "a bias of the logits": ("head.corrected_bias", _more, "logits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_file_is_found_and_named(right: tuple[Case, Allocation, onnx.ModelProto], fault: str) -> None:
    given, allocation, model = right
    name, change, place = FAULTS[fault]
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    (tensor,) = (each for each in wrong.graph.initializer if each.name == name)
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))

    with pytest.raises(ExportMistake, match=place):
        check(wrong, given.at(allocation), given.pixels)


def test_a_fault_in_the_graph_is_found(right: tuple[Case, Allocation, onnx.ModelProto]) -> None:
    given, allocation, model = right
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    (stem,) = (node for node in wrong.graph.node if node.name == "stem")
    (pads,) = (each for each in stem.attribute if each.name == "pads")
    pads.ints[:] = pads.ints[::-1]

    with pytest.raises(ExportMistake, match="first in the input of deep"):
        check(wrong, given.at(allocation), given.pixels)
