"""The part that needs packages which not every user has."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any, Literal

from tap_eval.mistake import ExportMistake

Weights = Literal["packed", "native", "int8"]
"""how a file of ONNX stores weights: at exactly their bits, in ONNX's own types, or as int8"""
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""what the extra `onnx` brings"""


def onnx() -> Any:
    """The module that writes, checks and describes ONNX; raises `ExportMistake` where what it needs is missing."""
    if missing := [each for each in _PACKAGES if find_spec(each) is None]:
        raise ExportMistake(f"a file of ONNX needs {', '.join(missing)}: pip install 'tap-agent[onnx]'.")
    return importlib.import_module("tap_eval.export.onnx")
