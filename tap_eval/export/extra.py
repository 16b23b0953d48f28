"""The part that needs packages which not every user has."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from tap_eval.mistake import ExportMistake

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""what the extra `onnx` brings"""


def onnx() -> Any:
    """The module that writes, checks and describes ONNX; raises `ExportMistake` where what it needs is missing."""
    if missing := [each for each in _PACKAGES if find_spec(each) is None]:
        raise ExportMistake(f"a file of ONNX needs {', '.join(missing)}: pip install 'tap-agent[onnx]'.")
    return importlib.import_module("tap_eval.export.onnx")
