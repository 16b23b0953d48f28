"""Measuring spread over a Ray cluster: one actor a CPU, each with the networks in its memory.

An actor that dies takes no result with it: its job goes to another. Actors measure as this
process would, with one thread each, so that results do not depend on who measured.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tap_eval.measuring.job import Job
from tap_eval.measuring.measurer import Measurer
from tap_eval.mistake import Mistake

if TYPE_CHECKING:
    from ray import ObjectRef

_CONNECTING_SECONDS = 5.0
_ALL_SECONDS, _ONE_SECONDS = 60.0, 300.0
"""for all workers to begin, and for one: they run at low priority, and take minutes where a machine is busy"""


class ExecutorMistake(Mistake):
    """A cluster that is not there, or that has gone."""

    kind = "executor"


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """A pool of actors on a Ray cluster; `spread` brings a network to them."""

    def __init__(self, address: str | None = None) -> None:
        """Joins the cluster at `address` (host:port, or auto), or starts one here. Raises `ExecutorMistake`."""
        try:
            import ray
        except ImportError as error:
            raise ExecutorMistake("Ray is not installed: pip install -e '.[ray]', or take --executor local.") from error
        if address and address != "auto":
            _check_reachable(address)
        self._ray = ray
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ExecutorMistake(
                f"no Ray cluster at {address or 'this machine'} ({error}): start one with `ray start --head`, "
                "or give no --address."
            ) from error
        actor: Any = ray.remote(num_cpus=1)(_Worker)
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        actors = [actor.remote() for _ in range(int(resources["CPU"]))]
        self._counting = threading.Lock()
        self._idle: queue.Queue[Any] = queue.Queue()
        answered = {actor.ping.remote(): actor for actor in actors}  # a busy cluster may have no room for some
        ready, late = ray.wait(list(answered), num_returns=len(answered), timeout=_ALL_SECONDS)
        if not ready:
            ready, _ = ray.wait(late, num_returns=1, timeout=_ONE_SECONDS - _ALL_SECONDS)
        for ping in ready:
            self._idle.put(answered[ping])
        self._living = len(ready)
        if not ready:
            raise ExecutorMistake(
                f"no worker of the Ray cluster has begun within {_ONE_SECONDS:.0f} s, for it has no free CPU or "
                "is busy with other things: free a CPU, or take --executor local."
            )

    @property
    def workers(self) -> int:
        """Actors that are alive."""
        return self._living

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def spread(self, measurer: Measurer) -> Spread:
        """The measurer, with its jobs done by the actors."""
        return Spread(self, measurer, self._ray.put(measurer))

    def run(self, reference: ObjectRef[Measurer], job: Job) -> Tensor:
        """The job done by an actor, by another if the first dies. Raises `ExecutorMistake` when none is left."""
        while self._living:
            try:
                actor = self._idle.get(timeout=1)
            except queue.Empty:
                continue
            try:
                found: Tensor = self._ray.get(actor.logits.remote([reference], job))
            except self._ray.exceptions.RayActorError:
                with self._counting:
                    self._living -= 1
                continue
            except BaseException:
                self._idle.put(actor)
                raise
            self._idle.put(actor)
            return found
        raise ExecutorMistake("every worker of the Ray cluster has gone: start it again, then resume the run.")


class Spread:
    """A measurer whose jobs go to the actors of a cluster; what is done once is done here."""

    def __init__(self, executor: RayExecutor, local: Measurer, reference: ObjectRef[Measurer]) -> None:
        self._executor = executor
        self._local = local
        self._reference = reference

    @property
    def workers(self) -> int:
        """See `Measures.workers`."""
        return max(self._executor.workers, 1)

    @property
    def unfit(self) -> str | None:
        """See `Measures.unfit`."""
        return self._local.unfit

    @property
    def sums(self) -> bool:
        """See `Measures.sums`."""
        return self._local.sums

    @property
    def notes(self) -> list[str]:
        """See `Measures.notes`."""
        return [*self._local.notes, f"by {self.workers} workers"]

    def logits(self, job: Job) -> Tensor:
        """See `Measures.logits`."""
        return self._executor.run(self._reference, job)

    def layer_errors(self, bits: int, count: int) -> list[float]:
        """See `Measures.layer_errors`."""
        return self._local.layer_errors(bits, count)


class _Worker:
    """What an actor is."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self._measurers: dict[str, Measurer] = {}

    def ping(self) -> None:
        """Answers when the actor runs."""

    def logits(self, reference: list[ObjectRef[Measurer]], job: Job) -> Tensor:
        """The reference is in a list, which Ray hands over as it is: a network is fetched once an actor."""
        import ray

        (one,) = reference
        if one.hex() not in self._measurers:
            self._measurers[one.hex()] = ray.get(one)
        return self._measurers[one.hex()].logits(job)


def _check_reachable(address: str) -> None:
    """Ray itself tries for half a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with closing(socket.create_connection((host, int(port)), timeout=_CONNECTING_SECONDS)):
            pass
    except (OSError, ValueError) as error:
        raise ExecutorMistake(
            f"{address} does not answer ({error}): give the host:port of a Ray cluster, "
            "or no --address to start one here."
        ) from error
