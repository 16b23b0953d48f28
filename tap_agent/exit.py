"""The exit codes of the program, one for each kind of mistake."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the exit status says."""

    OK = 0
    FAILED = 1
    """the machinery failed"""
    USAGE = 2
    """a flag that does not exist or does not parse"""
    CONFIG = 3
    NETWORK = 4
    WEIGHTS = 5
    IMAGES = 6
    BUDGET = 7
    BITS = 8
    MODEL = 9
    SANDBOX = 10
    RUN = 11
    PROXY = 12
    """a proxy that cannot be applied, or a search that found none"""
    EXECUTOR = 13
    LIMIT = 14
    """a limit of calls, cost or time has stopped the search; the best so far is kept"""
    TRACKING = 15
    PORT = 16
    STUDIO = 17
    """the server behind LangGraph Studio is not installed"""
    DEVICE = 18
    """a device that is not there, or on which a network does not run"""
    EXPORT = 19
    """a file of a network that cannot be written, or that is none"""
    BENCHMARK = 20
    """a file of measured allocations that cannot be made or read, or that is of another network"""
    DAMAGED = 21
    """a file that is not what was written: cut, changed, empty, or of a newer version"""
    STORAGE = 22
    """a disk that is full, or a folder that takes no files"""
    INTERRUPTED = 130
