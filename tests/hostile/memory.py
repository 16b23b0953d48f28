"""How much memory this process has taken at most."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_OWN = Path("/proc/self")


@contextmanager
def taking_at_most(most: int) -> Iterator[None]:
    """Fails where this process grows by more than so many bytes meanwhile, which only Linux tells."""
    if sys.platform != "linux":
        yield
        return
    if not (_OWN / "clear_refs").exists():
        pytest.skip("there is no /proc/self/clear_refs here, by which the most that was taken begins anew")
    (_OWN / "clear_refs").write_text("5")
    before = _bytes("VmRSS")
    yield
    grown = _bytes("VmHWM") - before
    assert grown <= most, f"it took {grown / 2**20:.0f} MiB"


def _bytes(row: str) -> int:
    found = re.search(rf"^{row}:\s+(\d+) kB", (_OWN / "status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])
