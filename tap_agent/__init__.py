"""The command line, and everything that puts the parts together."""

from pathlib import Path

RUNS = Path("runs")
"""where runs are kept, unless they are told otherwise"""
