"""Threads that compute side by side, each by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from tap_eval.device import CPU

_COUNTING = threading.Lock()
_USERS: list[int] = []
"""the number of threads that torch had, once for each that `one_thread_each` serves at the moment"""


class _AtOnce(Executor):
    """Does what it is given before it returns."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done = Future[Any]()
        done.set_result(work(*args, **kwargs))
        return done


@contextmanager
def one_thread_each(device: torch.device = CPU) -> Iterator[Executor]:
    """As many threads as torch has, each of which computes by itself: what comes of it depends on no number of them.

    Any other device than the CPU is given its work by the thread that asks.
    """
    if device != CPU:
        yield _AtOnce()
        return
    with _COUNTING:
        _USERS.append(torch.get_num_threads() if not _USERS else _USERS[0])
        torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(_USERS[0], initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        with _COUNTING:
            threads = _USERS.pop()
            if not _USERS:
                torch.set_num_threads(threads)
