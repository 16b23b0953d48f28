"""What a quantized network is worth, usable alone as a library: `from tap_eval import quantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tap_eval.library import Quantized, quantize

__all__ = ["Quantized", "quantize"]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: torch takes a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tap_eval import library

    return getattr(library, name)
