"""Rounded weights are computed once, read again as they were, and what was done otherwise is said."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tap_eval.allocation.choices import uniform
from tap_eval.images.images import AS_THEY_ARE, Images, Splits
from tap_eval.kept import Kept
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.job import Job
from tap_eval.measuring.measurer import Measurer
from tap_eval.measuring.recipe import Bounds, Recipe
from tap_eval.measuring.rounded import RoundedWeights
from tap_eval.mistake import DamagedMistake
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.quantization.calibration import calibrate, groups_of
from tap_eval.quantization.quantizer import Allocation
from tap_eval.quantization.rounding import Rounded, Rounding

BITS = (2, 4)


class Counted:
    """How often the network of a bench is run."""

    def __init__(self, prepared: Prepared) -> None:
        self.passes = 0
        prepared.network.register_forward_pre_hook(self._passed)

    def _passed(self, module: nn.Module, args: object) -> None:
        self.passes += 1


def weights(bench: Bench, folder: Path | None, rounding: Rounding = "gptq", memory: int = 2**29) -> RoundedWeights:
    pixels = bench.splits.calibrations[0].pixels
    seen = calibrate(bench.prepared, pixels)
    kept = Kept(folder)
    return RoundedWeights(
        bench.prepared, pixels, seen, rounding, BITS, [bench.digest], kept, memory, lambda what, done, count: None
    )


def all_of(rounded: RoundedWeights, bench: Bench, bits: Sequence[int] = BITS) -> list[Rounded]:
    return [rounded(layer.index, each) for layer in bench.layers for each in bits]


def assert_same(first: Sequence[Rounded], second: Sequence[Rounded]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.integers, other.integers)
        assert torch.equal(one.scale, other.scale)


def test_what_was_rounded_is_read_without_another_pass(bench: Bench, tmp_path: Path) -> None:
    first = all_of(weights(bench, tmp_path), bench)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(files) == 2 * len(bench.layers)
    again = weights(bench, tmp_path)
    counted = Counted(bench.prepared)
    assert_same(all_of(again, bench), first)
    assert counted.passes == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files
    again(0, 3)
    assert counted.passes > 0


def test_damaged_files_are_made_anew(bench: Bench, tmp_path: Path) -> None:
    first = all_of(weights(bench, tmp_path), bench)
    cut, empty, other, *_ = sorted(tmp_path.rglob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-7])
    empty.write_bytes(b"")
    other.write_bytes(b"not a file of tensors")
    assert_same(all_of(weights(bench, tmp_path), bench), first)
    counted = Counted(bench.prepared)
    again = weights(bench, tmp_path)
    counted.passes = 0
    assert_same(all_of(again, bench), first)
    assert counted.passes == 0


def test_files_of_before_there_were_seals_are_read_and_those_of_a_newer_version_left_alone(tmp_path: Path) -> None:
    kept, tensors = Kept(tmp_path), {"integers": torch.arange(3)}
    kept.keep("before", tensors)
    (path,) = tmp_path.rglob("before.safetensors")
    save_file(tensors, path)
    found = kept.recall("before")
    assert found
    assert torch.equal(found["integers"], tensors["integers"])
    save_file(tensors, path, {"sealed": "9 0123456789abcdef"})
    newer = path.read_bytes()
    with pytest.raises(DamagedMistake, match=r"before\.safetensors was written by a newer .*: update tap-agent\."):
        kept.recall("before")
    assert path.read_bytes() == newer
    save_file(tensors, path, {"sealad": "1 0123456789abcdef"})
    assert kept.recall("before") is None


def test_the_number_of_threads_changes_nothing(bench: Bench) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(all_of(weights(bench, None), bench))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_same(*found)


def test_little_memory_takes_layers_one_by_one_and_large_ones_in_blocks(bench: Bench) -> None:
    whole, small = weights(bench, None), weights(bench, None, memory=2 * 4 * 48 * 48)
    assert whole.blocked == []
    large = [module.weight[0].numel() ** 2 * groups_of(module) > 48**2 for module in bench.prepared.modules]
    assert small.blocked == [layer.name for layer, above in zip(bench.layers, large, strict=True) if above]
    assert 0 < sum(large) < len(large)
    assert weights(bench, None, "nearest", 2 * 4 * 48 * 48).blocked == []
    for layer in bench.layers:
        if layer.name not in small.blocked:
            assert torch.equal(small(layer.index, 2).integers, whole(layer.index, 2).integers)
    assert all(int(each.integers.abs().max()) <= 7 for each in all_of(small, bench, [4]))


def test_other_memory_other_images_and_other_rounding_are_other_files(bench: Bench, tmp_path: Path) -> None:
    for rounding, memory in (("gptq", 2**29), ("gptq", 2**13), ("nearest", 2**29)):
        all_of(weights(bench, tmp_path, rounding, memory), bench)  # type: ignore[arg-type]
    assert len(list(tmp_path.rglob("*.safetensors"))) > 2 * 2 * len(bench.layers)


def measurer(bench: Bench, folder: Path | None, bounds: Bounds | None = None) -> Measurer:
    recipe = Recipe("gptq", BITS, bench.digest, Kept(folder))
    return Measurer(bench.prepared, bench.splits, uniform(bench.layers, 4), bounds or Bounds(), recipe)


def test_a_finished_network_is_kept_on_disk(bench: Bench, tmp_path: Path) -> None:
    allocation = Allocation((2, 4) * 5, (8,) * 10)
    first = measurer(bench, tmp_path).finished(0, allocation)
    counted = Counted(bench.prepared)
    again = measurer(bench, tmp_path)
    found = again.finished(0, allocation)
    assert counted.passes == 0
    assert_same(found, first)
    assert all(torch.equal(one.bias, other.bias) for one, other in zip(found, first, strict=True))
    assert again.finished(0, allocation) is found
    assert not torch.equal(again.finished(1, allocation)[0].scale, found[0].scale)


@pytest.mark.parametrize("finished", [False, True])
def test_another_process_measures_the_same(bench: Bench, tmp_path: Path, finished: bool) -> None:
    here = measurer(bench, tmp_path)
    allocation = uniform(bench.layers, 2)
    job = Job(allocation, "search", 0, np.arange(100), integers=False, finished=finished)
    expected = here.logits(job)
    assert torch.equal(pickle.loads(pickle.dumps(here)).logits(job), expected)
    alone = measurer(bench, None)
    assert torch.equal(pickle.loads(pickle.dumps(alone)).logits(job), expected)


def test_a_finished_network_leaves_no_trace_on_the_next(bench: Bench) -> None:
    here, allocation = measurer(bench, None), uniform(bench.layers, 2)
    plain = Job(allocation, "search", 0, np.arange(100), integers=False)
    finished = Job(allocation, "search", 0, np.arange(100), integers=False, finished=True)
    full = Job(None, "search", 0, np.arange(100), integers=False)
    first = [here.logits(job) for job in (plain, finished, full)]
    assert not torch.equal(first[0], first[1])
    for job, expected in zip((finished, plain, full, plain), (first[1], first[0], first[2], first[0]), strict=True):
        assert torch.equal(here.logits(job), expected)


def test_what_fell_back_and_what_was_cut_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    half = rng.integers(0, 256, (64, 1, 4, 8), np.uint8)
    contrary = np.where(np.arange(64)[:, None, None, None] < 16, 255 - half, half)
    images = Images(np.concatenate([half, contrary], 2), torch.arange(64) % 10, AS_THEY_ARE)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    splits = Splits("contrary", tuple("0123456789"), (images,), images, images)
    prepared = prepare(network.eval(), images.pixels[:2])
    for moments, blocked in ((2**29, []), (2**13, ["with inputs in blocks when 1 are rounded, whose second moments"])):
        recipe = Recipe("gptq", (2, 3, 4, 8), "contrary", Kept(tmp_path))
        found = Measurer(prepared, splits, uniform(prepared.layers, 4), Bounds(moments=moments), recipe)
        found.logits(Job(uniform(prepared.layers, 2), "search", 0, np.arange(16), integers=False))
        fallen, *rest = found.notes
        assert re.fullmatch(r"with [1-4] of 4 weights, by layer and bits, rounded to the nearest, .* left out", fallen)
        assert len(rest) == len(blocked)
        assert all(note.startswith(expected) for note, expected in zip(rest, blocked, strict=True))
