"""Where runs and measurements are kept."""

import os
from pathlib import Path

RUNS = Path("runs")
"""where runs are kept, unless they are told otherwise"""
TABLES = Path("tables")
"""where tables are kept, likewise"""


def cache_folder() -> Path:
    """Where measurements and trained networks are kept between runs: `TAP_CACHE`, or `.cache` here."""
    return Path(os.environ.get("TAP_CACHE") or ".cache")
