"""A network in your own code, quantized within a budget and saved: no run, no language model, no labels.

python examples/quantize.py
"""

from __future__ import annotations

from pathlib import Path

from tap_agent.paths import cache_folder
from tap_eval import quantize
from tap_eval.images.sources import open_source, split
from tap_eval.networks.load import load_network


def main() -> None:
    """Prints the bits of each layer, and how often the class is right before and after."""
    images = split(open_source("digits"), calibration=None, seed=0)
    network = load_network("digits", None, cache_folder()).network

    quantized = quantize(network, images.calibrations[0].pixels, "3bit")
    quantized.save(Path(cache_folder()) / "digits.safetensors")

    for layer, bits in zip(quantized.layers, quantized.allocation.weights, strict=True):
        print(f"{layer.name:14} {bits} bits")
    print(f"{quantized.size.total:,} bytes")
    pixels, labels = images.search.pixels, images.search.labels
    for name, logits in (("full precision", network(pixels)), ("quantized", quantized(pixels))):
        print(f"{name:14} {100 * (logits.argmax(1) == labels).double().mean():.1f} % of {len(labels)} images")


if __name__ == "__main__":
    main()
