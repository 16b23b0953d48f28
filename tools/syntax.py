"""The syntax of code that others wrote, which the host reads, and neither compiles nor runs."""

from __future__ import annotations

import ast
import threading
import warnings
from contextlib import suppress

_TRIES = 20
_PARSING = threading.Lock()  # the filters of warnings belong to all threads


def parse(code: str) -> ast.Module:
    """The syntax tree of `code`, without the warnings that CPython prints of odd code; raises as `ast.parse` does.

    CPython 3.11 counts the depth of trees for all threads together, and raises `SystemError` of whole code where a
    library reads other code meanwhile (python/cpython#106905): then it is read again.
    """
    with _PARSING, warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        for _ in range(_TRIES):
            with suppress(SystemError):
                return ast.parse(code)
        return ast.parse(code)
