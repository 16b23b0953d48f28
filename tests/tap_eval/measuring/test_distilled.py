"""Distilled images have the statistics of a network, calibrate it nearly as well as real ones, and are made once."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tap_eval.allocation.choices import uniform
from tap_eval.images.images import Images, Splits
from tap_eval.kept import Kept
from tap_eval.measuring.accuracy import mean_kl
from tap_eval.measuring.distilled import DistilledDraws, calibrated_on
from tap_eval.measuring.progress import silent
from tap_eval.measuring.recipe import Bounds
from tap_eval.measuring.rounded import RoundedWeights
from tap_eval.mistake import ImagesMistake
from tap_eval.networks.digits import DigitsCNN
from tap_eval.preparing.distilling import distilled, statistics_loss
from tap_eval.preparing.prepare import prepare
from tap_eval.quantization.calibration import calibrate
from tap_eval.quantization.quantizer import QuantizedNetwork


def draws(
    network: nn.Module, splits: Splits, folder: Path | None, told: list[int] | None = None, steps: int = 10
) -> DistilledDraws:
    advance = (lambda what, done, of: told.append(done)) if told is not None else silent
    return DistilledDraws(network, splits.search, 16, 2, 0, Kept(folder), advance=advance, steps=steps)


def noise_like(images: Images) -> Images:
    """Such as distilling begins with."""
    stored = distilled(DigitsCNN(), images.transform, images.stored.shape, 0, steps=0)
    return replace(images, stored=stored.numpy())


def test_distilled_images_have_the_statistics_of_the_network_and_calibrate_it(
    network: DigitsCNN, splits: Splits
) -> None:
    made = draws(network, splits, None, steps=150)
    first, second = made
    noise = noise_like(first)
    assert len(made) == 2
    assert first.stored.dtype.name == "uint8"
    assert first.pixels.shape == splits.calibrations[0].pixels.shape
    assert first.digest != second.digest
    assert torch.equal(first.labels, network(first.pixels).argmax(1))
    with torch.no_grad():
        losses = [statistics_loss(network, images.pixels) for images in (first, noise, splits.calibrations[0])]
    assert losses[0] < 0.2 * losses[1]
    assert losses[0] < losses[2], "16 real images have others than all"

    search = splits.search.pixels
    with torch.no_grad():
        expected = network(search)

    def divergence(images: Images) -> float:
        pixels = images.pixels
        prepared = prepare(network, pixels[:2])
        seen, memory = calibrate(prepared, pixels), Bounds().moments
        weights = RoundedWeights(prepared, pixels, seen, "gptq", (3,), [], Kept(None), memory, silent)
        quantized = QuantizedNetwork(prepared, seen, [partial(weights, layer.index) for layer in prepared.layers])
        quantized.choose(uniform(prepared.layers, 3))
        return mean_kl(expected, quantized.logits(search, 100))

    real, ours, theirs = (divergence(images) for images in (splits.calibrations[0], first, noise))
    assert ours < 0.3 * theirs
    assert ours < 2 * real


def test_a_draw_is_made_once_and_the_same_by_the_same_seed(network: DigitsCNN, splits: Splits, tmp_path: Path) -> None:
    told: list[int] = []
    made = draws(network, splits, tmp_path, told)
    assert told == []
    first = made[0]
    assert told == list(range(1, 11))
    again = draws(network, splits, tmp_path, told)
    assert again[0].digest == first.digest
    assert len(told) == 10, "what is kept is read"
    assert draws(network, splits, None)[0].digest == first.digest
    assert [each.digest for each in pickle.loads(pickle.dumps(again))] == [each.digest for each in again]
    with torch.no_grad():
        network.classifier.bias += 1
    draws(network, splits, tmp_path, told)[0]
    assert len(told) == 3 * 10, "of another network, and the second draw of the first"
    assert "distilled: 16 a draw" in calibrated_on(splits, made).notes[-1]


def test_a_network_without_batch_normalization_has_none(splits: Splits) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    with pytest.raises(ImagesMistake, match=r"Sequential has no batch normalization, whose .*: give images with --cal"):
        draws(network, splits, None)[0]
