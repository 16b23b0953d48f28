"""Measuring on a real Ray cluster of two nodes on this machine, one of which is killed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tap_eval.allocation.choices import uniform
from tap_eval.measuring.accuracy import Measurement
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.cluster import ExecutorMistake, RayExecutor
from tap_eval.measuring.ledger import Ledger
from tap_eval.quantization.quantizer import Allocation

ray = pytest.importorskip("ray", reason="measuring on several machines needs the extra 'ray'")


def same(one: Measurement, other: Measurement) -> bool:
    return np.array_equal(one.correct, other.correct) and np.array_equal(one.kl, other.kl)


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_cluster_measures_what_this_process_measures_and_a_killed_node_costs_no_result(
    bench: Bench, cluster: Any, tmp_path: Path
) -> None:
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    allocations = [
        Allocation(tuple((2, 4, 8)[seed // 3**place % 3] for place in range(10)), (8,) * 10)
        for seed in range(0, 600, 10)
    ]
    last = len(bench.stages) - 1
    expected = bench.seen_all(allocations, last)
    with RayExecutor(cluster.address) as executor:
        assert executor.workers == 2
        spread = Bench(
            "digits", bench.prepared.network, bench.splits, bench.task, Ledger(tmp_path / "ledger.sqlite"),
            spread=executor.spread,
        )  # fmt: skip
        assert same(spread.seen_all(allocations[:4], last)[0], expected[0])
        (alone,) = spread.seen_all(allocations[4:5], last)  # its images are shared by both
        assert same(alone, expected[4])
        found: list[Any] = []
        working = threading.Thread(target=lambda: found.extend(spread.seen_all(allocations, last)))
        working.start()
        time.sleep(0.2)
        cluster.remove_node(second, allow_graceful=False)
        working.join(timeout=120)
        assert len(found) == len(allocations)
        assert all(map(same, found, expected))
        deadline = time.monotonic() + 60
        while sum(node["Alive"] for node in ray.nodes()) == 2 and time.monotonic() < deadline:
            time.sleep(0.1)  # a worker may outlive its node, and answer, until the cluster notices
        # whether or not the killed worker was busy just then, one of these jobs is handed to it
        after = [uniform(bench.layers, 4), uniform(bench.layers, 8)]
        found = spread.seen_all(after, last)
        assert all(map(same, found, bench.seen_all(after, last)))
        assert executor.workers == 1


def test_a_cluster_that_is_not_there_is_a_sentence() -> None:
    for address, reason in (("127.0.0.1:9", "does not answer"), ("nonsense", "does not answer")):
        with pytest.raises(ExecutorMistake, match=reason):
            RayExecutor(address)
