import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tap_eval.export.packing import packed
from tap_eval.export.unpacking import DOMAIN, NAME, unpack
from tap_eval.quantization.quantizer import raised


def model(integers: torch.Tensor, bits: int, factor: int) -> onnx.ModelProto:
    """What unpacks rows of integers."""
    rows = numpy_helper.from_array(packed(integers, bits).numpy(), "rows")
    node = helper.make_node(
        NAME, ["rows"], ["integers", "zeros"], domain=DOMAIN, bits=bits, factor=factor, shape=list(integers.shape)
    )
    outputs = [
        helper.make_tensor_value_info("integers", onnx.TensorProto.INT8, list(integers.shape)),
        helper.make_tensor_value_info("zeros", onnx.TensorProto.INT8, [len(integers)]),
    ]
    graph = helper.make_graph([node], "graph", [], outputs, [rows])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    made = helper.make_model(graph, opset_imports=opsets, functions=[unpack()], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 3, 3), (1, 8), (4, 1), (7, 11)])
def test_a_runtime_gets_the_integers_that_were_packed(bits, shape):
    top = 2 ** (bits - 1) - 1
    integers = torch.randint(-top, top + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    integers.view(-1)[0] = -top
    factor = int(raised(torch.tensor(bits)))
    made = model(integers, bits, factor)

    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    for got, zeros in (session.run(None, {}), ReferenceEvaluator(made).run(None, {})):
        assert got.dtype == np.int8
        assert np.array_equal(got, integers.numpy() * factor)
        assert np.array_equal(zeros, np.zeros(shape[0], np.int8))


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_raised_as_far_as_their_products_fit(bits):
    top = 2 ** (bits - 1) - 1
    factor = int(raised(torch.tensor(bits)))

    assert factor == 1 or top * factor <= 64 < 2 * top * factor
