"""What `best.json` and `apply --out` write: bits, and everything by which anyone gets the same figures again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tap_agent.runs.result import Row
from tap_agent.settings.fields import figured
from tap_agent.settings.model import Settings
from tap_eval.export.between import between
from tap_eval.export.header import told_between
from tap_eval.images.images import Images
from tap_eval.measuring.bench import Bench
from tap_eval.quantization import quantizer
from tap_eval.quantization.quantizer import Allocation, QuantizedNetwork


@dataclass(frozen=True)
class Chosen:
    """A network with the bits that were chosen for it, and the row that it has in the table."""

    bench: Bench
    row: Row
    allocation: Allocation

    @cached_property
    def network(self) -> QuantizedNetwork:
        """As it was measured on the first draw of calibration images."""
        return self.bench.quantized(self.allocation, finished=self.bench.keeps_finished(self.allocation))


def chosen(rows: Sequence[Row], benches: Sequence[Bench]) -> list[Chosen]:
    """What a table is about, one a network."""
    own = [row for row in rows if row.kind == "proxy"]
    pairs = zip(own, benches, strict=True)
    return [Chosen(bench, row, row.allocation.allocation()) for row, bench in pairs if row.allocation]


def record(
    thought: str, code: str, networks: Sequence[dict[str, Any]], settings: Settings, provenance: dict[str, Any]
) -> dict[str, Any]:
    """The whole file, with the proxy if there is one; no setting of a language model is in it."""
    return {
        "thought": thought,
        "code": code,
        "settings": figured(settings) | {"device": networks[0]["measured_on"]["device"]},
        "networks": list(networks),
        "provenance": provenance | {"versions": versions()},
    }


def versions() -> dict[str, Any]:
    """Of what figures depend on."""
    return {name: version(name) for name in ("tap-agent", "torch")} | {"quantizer": quantizer.VERSION}


def allocated(chosen: Chosen, *, scales: bool) -> dict[str, Any]:
    """One network: its figures, what they depend on, and its layers, with the scales of their weights if asked for."""
    row, bench = chosen.row, chosen.bench
    return {
        "network": row.network,
        "budget": row.budget,
        "weight_bits": row.bits,
        "size_bytes": row.size_bytes,
        "size_parts": row.parts,
        "bops": row.bops,
        "latency_ms": row.latency_ms,
        "search": row.search.model_dump() if row.search else None,
        "test": row.test.model_dump(),
        "finished": bench.keeps_finished(chosen.allocation),
        "test_top1_by_calibration_draw": row.draws,
        "weights_digest": bench.weights_digest,
        "images": _images(bench),
        "measured_on": bench.measured_on(chosen.allocation),
        "layers": _layers(chosen, scales),
        "between": _between(chosen.network),
        "operands": _operands(chosen.network),
        "in_float32": {
            "share": row.in_float,
            "tensors": [
                {"name": rest.name, "bytes": 4 * rest.count, "read_by": rest.reason}
                for rest in bench.prepared.rest
                if rest.used
            ],
        },
        "unused": [rest.name for rest in bench.prepared.rest if not rest.used],
    }


def _images(bench: Bench) -> dict[str, Any]:
    splits = bench.splits
    return {
        "name": splits.name,
        "classes": list(splits.classes),
        "input": list(splits.search.stored.shape[1:]),
        "transform": splits.search.transform.model_dump(mode="json"),
        "calibration": {**_split(splits.calibrations[0]), "draw": 0},
        "search": _split(splits.search),
        "test": _split(splits.test),
    }


def _split(images: Images) -> dict[str, Any]:
    return {"count": len(images), "digest": images.digest}


def _layers(chosen: Chosen, scales: bool) -> list[dict[str, Any]]:
    bench, found = chosen.bench, []
    for layer, quantized, bits, activation in zip(
        bench.layers, chosen.network.layers, chosen.allocation.weights, chosen.allocation.activations, strict=True
    ):
        assert quantized.weight is not None
        assert quantized.affine is not None
        found.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(quantized.weight.integers.shape),
                "params": layer.params,
                "weight_bits": bits,
                "activation_bits": activation,
                "input_scale": quantized.affine.scale,
                "input_zero_point": quantized.affine.zero_point,
                **({"weight_scales": quantized.weight.scale.tolist()} if scales else {}),
            }
        )
    return found


def _between(network: QuantizedNetwork) -> list[dict[str, Any]]:
    """What travels in integers between layers."""
    return [
        told_between(value, network).model_dump(mode="json", exclude={"range"})
        | {"scale": value.affine.scale, "zero_point": value.affine.zero_point}
        for value in between(network) or ()
    ]


def _operands(network: QuantizedNetwork) -> list[dict[str, Any]]:
    """Those of products of two activations that are in 8-bit integers."""
    pairs = zip(network.prepared.operands, network.operands, strict=True)
    return [{"name": name, "scale": affine.scale, "zero_point": affine.zero_point} for name, affine in pairs]


def about(chosen: Chosen) -> dict[str, Any]:
    """What a file for a runtime says of itself: nothing of the machine or the day that it was made on."""
    row, images = chosen.row, _images(chosen.bench)
    kind, colon, where = images["name"].partition(":")
    return {
        "network": row.network,
        "input": images["input"],
        "classes": images["classes"],
        "transform": images["transform"],
        "images": f"{kind}:{Path(where).name}" if colon else kind,
        "test": row.test.model_dump(),
        "weight_bits": row.bits,
        "weights_digest": chosen.bench.weights_digest,
        "activation_ranges": chosen.bench.task.ranges,
        "attention_activations": "8" if chosen.bench.prepared.operands else "off",
        "measured_on": chosen.bench.measured_on(chosen.allocation),
        "versions": versions(),
    }
