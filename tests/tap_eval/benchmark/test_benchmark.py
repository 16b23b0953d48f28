"""A benchmark holds what was measured, comes back from its file as it was, and tells when it was changed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy.stats import spearmanr

from tap_eval.allocation.budget import spent
from tap_eval.allocation.score import importance
from tap_eval.allocation.size import weight_size
from tap_eval.baselines.baselines import RULES, losses
from tap_eval.baselines.rule import Effort
from tap_eval.benchmark.benchmark import SHIPPED, Benchmark, build, read, write
from tap_eval.images.images import Splits
from tap_eval.images.sources import digits, split
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.mistake import BenchmarkMistake, StorageMistake
from tap_eval.networks.digits import DigitsCNN, load_digits_cnn
from tap_eval.quantization.quantizer import VERSION, Allocation, LayerBits
from tests.faults.faults import full

EDGES = (2.0, 4.0, 8.0)


@pytest.fixture
def built(bench: Bench) -> Benchmark:
    return build(bench, EDGES, 16, 0, lambda: {"weight_error": [[3.0, 2.0, 1.0]] * len(bench.layers)})


def test_it_holds_what_is_measured(bench: Bench, built: Benchmark) -> None:
    about = built.about
    assert [entry.stratum for entry in built.entries] == [0] * 8 + [1] * 8
    for entry in built.entries:
        accuracy = bench.measure(entry.allocation)
        assert (entry.correct, about.count) == (accuracy.correct, accuracy.count)
        assert entry.kl == accuracy.kl > 0
        assert entry.bytes == bench.size(entry.allocation).total
        assert entry.bits == weight_size(bench.layers, entry.allocation) / sum(layer.params for layer in bench.layers)
    assert about.correct == bench.measure(None).correct
    assert (about.features, about.task, about.layers) == (bench.features, bench.described_task, bench.layers)
    assert (about.digest, about.quantizer, about.choices) == (bench.digest, VERSION, (2, 4, 8))


def test_it_comes_back_from_its_file_as_it_was(built: Benchmark, tmp_path: Path) -> None:
    path = tmp_path / "of" / "digits.parquet"
    write(path, built)
    found = read(path)
    assert found.entries == built.entries
    assert found.about.model_copy(update={"rows": ""}) == built.about
    table = parquet.read_table(path)
    assert table["kl"].to_pylist() == [entry.kl for entry in built.entries]
    assert [*path.parent.iterdir()] == [path]


def test_scores_foretell_the_order_of_allocations_of_about_one_size(bench: Bench, built: Benchmark) -> None:
    scores = [1 + layer.index % 3 for layer in bench.layers]
    found = []
    for place in (0, 1):
        those = [entry for entry in built.entries if entry.stratum == place]
        lost = [
            sum(
                weight * (4.0**-bits + 4.0**-inputs)
                for weight, bits, inputs in zip(importance(scores), *_bits(each.allocation), strict=True)
            )
            for each in those
        ]
        found.append(spearmanr(lost, [each.kl for each in those])[0])
    assert built.foretelling(scores) == pytest.approx(np.mean(found))
    assert built.foretelling([10 * score for score in scores]) == pytest.approx(np.mean(found))
    assert built.foretelling([1.0] * len(scores)) != built.foretelling(scores)


def _bits(allocation: Allocation) -> tuple[list[int], list[int]]:
    return [bits for bits in allocation.weights if isinstance(bits, int)], list(allocation.activations)


def test_it_is_of_its_network_on_any_images_and_of_no_other(
    bench: Bench, channel_bench: Bench, built: Benchmark, splits: Splits, cache: Path
) -> None:
    ledger = Ledger(cache / "ledger.sqlite")
    built.check_of(channel_bench)  # bits to choose from may be others
    images = split(digits(), calibration=None, seed=1, draws=1, search=100, test=100)
    built.check_of(Bench("digits", load_digits_cnn(cache), images, bench.task, ledger))
    untrained = Bench("digits", DigitsCNN(), splits, bench.task, ledger)
    with pytest.raises(BenchmarkMistake, match="not of the digits of this run, for they have other weights"):
        built.check_of(untrained)
    for about, words in [
        ({"quantizer": 0}, f"quantizer 0 in place of {VERSION}"),
        ({"layers": built.about.layers[:-1]}, "other layers"),
        ({"activations": ("omse ranges",)}, "other ranges of activations"),
        ({"features": [{"depth": 1.0}]}, "other features"),
    ]:
        other = replace(built, about=built.about.model_copy(update=about))
        with pytest.raises(BenchmarkMistake, match=words):
            other.check_of(bench)


def test_a_file_that_is_none_or_was_changed_is_refused(built: Benchmark, tmp_path: Path) -> None:
    path = tmp_path / "digits.parquet"
    with pytest.raises(BenchmarkMistake, match="is not there: tap-agent benchmark build"):
        read(path)
    path.write_text("nothing")
    with pytest.raises(BenchmarkMistake, match="is no Parquet file"):
        read(path)
    parquet.write_table(pa.table({"image": [1]}), path)
    with pytest.raises(BenchmarkMistake, match="holds no measured allocations"):
        read(path)
    write(path, built)
    table = parquet.read_table(path)
    better = table.set_column(6, "kl", pa.array([0.0] * len(table)))
    parquet.write_table(better, path)
    with pytest.raises(BenchmarkMistake, match="was changed after it was measured"):
        read(path)
    for change in (
        {"edges": (2.0, 8.0)},
        {"activations": ("omse ranges",)},
        {"foretold": {"weight_error": [[1.0]]}},
        {"features": []},
    ):
        write(path, built)
        about = read(path).about.model_copy(update=change)
        table = parquet.read_table(path).replace_schema_metadata({"tap benchmark": about.model_dump_json()})
        parquet.write_table(table, path)
        with pytest.raises(BenchmarkMistake, match="was changed after it was measured"):
            read(path)
    write(path, replace(built, about=built.about.model_copy(update={"format": 2})))
    with pytest.raises(BenchmarkMistake, match="of another version of this program"):
        read(path)


def test_on_a_full_disk_a_file_stays_as_it_was(built: Benchmark, tmp_path: Path) -> None:
    path = tmp_path / "digits.parquet"
    write(path, built)
    before = path.read_bytes()
    with full(), pytest.raises(StorageMistake, match=r"digits.parquet cannot be written \(.*: make room there"):
        write(path, built)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [before]


def test_what_baselines_foretell_is_least_where_they_allocate(bench: Bench) -> None:
    found = losses(bench, 0, left_out=pytest.fail)
    assert {"weight_error", "layer_error", "every_error", "hawq", "hawq_v2", "ompq", "bops"} <= found.keys()
    assert not {"uniform", "random_scores", "direct", "best_of_random"} & found.keys()
    choices, budget = sorted(bench.task.choices.weights), bench.task.budget
    for name in ("weight_error", "bparams", "bops", "hawq", "hawq_v2", "snip", "emq", "auto_quantize", "every_error"):

        def lost(bits: Sequence[LayerBits], rows: list[list[float]] = found[name]) -> float:
            return sum(row[choices.index(each)] for row, each in zip(rows, bits, strict=True) if isinstance(each, int))

        (its,) = RULES[name].find(bench, Effort(0, 0)).allocations
        several = [Allocation(bits, its.activations) for bits in itertools.product(choices, repeat=len(bench.layers))]
        within = [each for each in several if spent(each, bench.layers, budget) <= budget.limit(bench.layers)]
        assert lost(its.weights) == pytest.approx(min(lost(each.weights) for each in within))


def test_the_one_that_is_shipped_is_of_resnet20_and_of_this_quantizer() -> None:
    shipped = read(SHIPPED)
    assert shipped.about.network == "cifar_resnet20"
    assert len(shipped.entries) >= 500
    assert shipped.about.quantizer == VERSION
