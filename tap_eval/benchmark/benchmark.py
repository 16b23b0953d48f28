"""Allocations of one network with what they were measured to be worth, and the Parquet file of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from pydantic import BaseModel, ConfigDict, ValidationError

from tap_eval.allocation.size import weight_size
from tap_eval.benchmark.correlation import expected_losses, foretelling, noise
from tap_eval.benchmark.drawing import drawn
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import key
from tap_eval.mistake import BenchmarkMistake
from tap_eval.preparing.layers import Layer
from tap_eval.proxies.features import Features, Inputs
from tap_eval.proxies.fitness import LayerScores
from tap_eval.quantization import quantizer
from tap_eval.quantization.quantizer import Allocation
from tap_eval.storage import replacing

SHIPPED = Path(__file__).with_name("resnet20-cifar10.parquet")
"""ResNet-20 on CIFAR-10, which comes with the program"""
_KEY = "tap benchmark"
_LEAST = 8
"""allocations of a range of size, below which ranks say next to nothing"""
_SIDE_BY_SIDE = 8
"""allocations that are measured before the next step is told"""
_SCHEMA = pa.schema(
    [
        ("stratum", pa.int16()),
        ("weights", pa.list_(pa.int8())),
        ("activations", pa.list_(pa.int8())),
        ("bits", pa.float64()),
        ("bytes", pa.int64()),
        ("correct", pa.int32()),
        ("kl", pa.float64()),
    ]
)
"""A row an allocation: average bits a weight, bytes of the packed network, images that are classified correctly, and
the mean KL divergence (nats) of outputs from full precision"""


class About(BaseModel):
    """What all allocations were measured on, and what a proxy is given of it."""

    model_config = ConfigDict(frozen=True)
    format: Literal[1] = 1
    """raised when files of before can be read no more"""
    tap: str
    quantizer: int
    """version of the quantizer"""
    network: str
    digest: str
    """of its structure, its weights and what it makes of images"""
    weights: str
    """digest of the tensors alone"""
    data: str
    images: str
    """digest of the search images"""
    count: int
    """of them"""
    calibration: str
    """digest of the calibration images"""
    choices: tuple[int, ...]
    inputs: Inputs
    rounding: str
    sums: str
    activations: tuple[str, ...] = ()
    """as `Bench.activations` has it"""
    seed: int
    edges: tuple[float, ...]
    """average bits a weight that strata lie between"""
    correct: int
    """images that full precision classifies correctly"""
    layers: tuple[Layer, ...]
    features: list[Features]
    task: Features
    foretold: dict[str, list[list[float]]]
    """by baseline, what each layer loses at each of the choices, of those that are a sum over layers"""
    rows: str = ""
    """digest of what was measured, and of all this"""


@dataclass(frozen=True)
class Entry:
    """A measured allocation."""

    stratum: int
    allocation: Allocation
    bits: float
    bytes: int
    correct: int
    kl: float


@dataclass(frozen=True)
class Benchmark:
    """Measured allocations of a network, unfinished: rounded a layer at a time, as candidates of a search are."""

    about: About
    entries: tuple[Entry, ...]

    @cached_property
    def noise(self) -> np.ndarray:
        """See `tap_eval.benchmark.correlation.noise`."""
        return noise([entry.allocation for entry in self.entries])

    def foretelling(self, scores: LayerScores) -> float:
        """How well scores of layers foretell the divergences of allocations of about one size: Eq. 3, in [-1, 1].

        Spearman's rho between the expected losses and the mean KL divergences, in the mean over strata.
        """
        lost = expected_losses(scores, self.noise).tolist()
        return foretelling(lost, [each.kl for each in self.entries], [each.stratum for each in self.entries])

    def check_of(self, bench: Bench) -> None:
        """Raises `BenchmarkMistake` unless the network is that of `bench`, quantized and described to proxies alike.

        Its calibration images may be others, as those of another seed are.
        """
        about, task = self.about, bench.task
        sums = task.sums if bench.rounds_sums else "float"
        for same, what in (
            (about.layers == bench.layers, "layers"),
            (about.weights == bench.weights_digest, "weights"),
            (about.quantizer == quantizer.VERSION, f"quantizer {about.quantizer} in place of {quantizer.VERSION}"),
            (about.rounding == task.rounding, f"rounding {about.rounding} in place of {task.rounding}"),
            (about.sums == sums, f"sums {about.sums} in place of {sums}"),
            (list(about.activations) == bench.activations, "ranges of activations, or another attention"),
            (about.inputs == task.inputs, f"inputs {about.inputs} in place of {task.inputs}"),
            ({*about.features[0]} == {*bench.features[0]}, "features"),
        ):
            if not same:
                raise BenchmarkMistake(
                    f"the measured allocations of {about.network} are not of the {bench.name} of this run, for they "
                    f"have other {what}: build a file with its settings, by tap-agent benchmark build."
                )


def build(
    bench: Bench,
    edges: Sequence[float],
    count: int,
    seed: int,
    foretell: Callable[[], Mapping[str, list[list[float]]]],
    advance: Callable[[int], None] = lambda _: None,
) -> Benchmark:
    """Measures `count` allocations on the search split under the first draw, whatever was measured before recalled.

    `foretell` is called once they are drawn, and `advance` told how many more are done. Raises `BenchmarkMistake` where
    there are not so many, or too few in a stratum for coefficients.
    """
    choices, whole = bench.task.choices, sum(layer.params for layer in bench.layers)
    if count < _LEAST * (len(edges) - 1):
        raise BenchmarkMistake(
            f"{count} allocations in {len(edges) - 1} ranges of size are fewer than {_LEAST} in each: give a greater "
            "--count, or fewer --strata."
        )
    strata = drawn(bench.layers, choices, edges, count, seed)
    foretold = foretell()
    pairs = [(place, allocation) for place, those in enumerate(strata) for allocation in those]
    entries: list[Entry] = []
    for start in range(0, len(pairs), _SIDE_BY_SIDE):
        part = pairs[start : start + _SIDE_BY_SIDE]
        (found,) = bench.measure_all([allocation for _, allocation in part], "search", [0])
        for (place, allocation), accuracy in zip(part, found, strict=True):
            bits = weight_size(bench.layers, allocation) / whole
            entries.append(Entry(place, allocation, bits, bench.size(allocation).total, accuracy.correct, accuracy.kl))
        advance(len(part))
    full = bench.measure(None)
    return Benchmark(
        About(
            tap=version("tap-agent"),
            quantizer=quantizer.VERSION,
            network=bench.name,
            digest=bench.digest,
            weights=bench.weights_digest,
            data=bench.splits.data,
            images=bench.splits.search.digest,
            count=full.count,
            calibration=bench.splits.calibrations[0].digest,
            choices=tuple(sorted(choices.weights)),
            inputs=bench.task.inputs,
            rounding=bench.task.rounding,
            sums=bench.task.sums if bench.rounds_sums else "float",
            activations=tuple(bench.activations),
            seed=seed,
            edges=tuple(edges),
            correct=full.correct,
            layers=bench.layers,
            features=bench.features,
            task=bench.described_task,
            foretold=dict(foretold),
        ),
        tuple(entries),
    )


def write(path: Path, benchmark: Benchmark) -> None:
    """Into a Parquet file, whole or not at all. Raises `StorageMistake`."""
    columns = _columns(benchmark.entries)
    about = benchmark.about.model_copy(update={"rows": _digest(benchmark.about, columns)})
    with (
        replacing(path, "make room there, or name another file") as fresh,
        parquet.ParquetWriter(fresh, _SCHEMA, compression="zstd", store_schema=False) as file,
    ):
        file.write_table(pa.table(columns, _SCHEMA))
        file.add_key_value_metadata({_KEY: about.model_dump_json()})  # once; in the schema it would be there twice


def read(path: Path) -> Benchmark:
    """From a file of `write`. Raises `BenchmarkMistake` for any other, and for one that was changed since."""
    try:
        with path.open("rb") as opened:
            file = parquet.ParquetFile(opened)
            table, held = file.read(), (file.metadata.metadata or {}).get(_KEY.encode())
    except PermissionError:  # which is told as what it is
        raise
    except FileNotFoundError as error:
        raise BenchmarkMistake(f"{path} is not there: tap-agent benchmark build --out {path} makes one.") from error
    except (OSError, pa.ArrowException) as error:
        raise BenchmarkMistake(
            f"{path} is no Parquet file that can be read ({_line(error)}): build it again."
        ) from error
    if held is None or not table.schema.remove_metadata().equals(_SCHEMA):
        raise BenchmarkMistake(
            f"{path} holds no measured allocations, or those of another version: tap-agent benchmark build makes them."
        )
    try:
        about = About.model_validate_json(held)
    except ValidationError as error:
        raise BenchmarkMistake(f"{path} is of another version of this program: build it again.") from error
    columns = table.to_pydict()
    if _digest(about, columns) != about.rows or len(table) == 0:
        raise BenchmarkMistake(f"{path} was changed after it was measured: build it again.")
    rows = zip(*(columns[name] for name in _SCHEMA.names), strict=True)
    return Benchmark(
        about,
        tuple(
            Entry(stratum, Allocation(tuple(weights), tuple(activations)), *rest)
            for stratum, weights, activations, *rest in rows
        ),
    )


def _digest(about: About, columns: Mapping[str, Sequence[object]]) -> str:
    usual = None if about.activations else {"activations"}  # of which files of before do not speak
    return key(about.model_copy(update={"rows": ""}).model_dump_json(exclude=usual), columns)


def _columns(entries: Sequence[Entry]) -> dict[str, list[object]]:
    rows = [
        (each.stratum, [*each.allocation.weights], [*each.allocation.activations], each.bits, each.bytes, each.correct,
         each.kl)
        for each in entries
    ]  # fmt: skip
    return {name: [*column] for name, column in zip(_SCHEMA.names, zip(*rows, strict=True), strict=True)}


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
