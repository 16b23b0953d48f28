"""Layers by their sizes alone."""

from __future__ import annotations

from tap_eval.preparing.layers import Layer


def make_layers(*params: int, channels: int = 4) -> list[Layer]:
    last = len(params) - 1
    return [
        Layer(
            name=f"layer{i}", kind="conv", block="", index=i, depth=(i + 1) / len(params), in_channels=4,
            out_channels=channels, kernel=1, stride=1, groups=1, input_size=1, output_size=1, tokens=1,
            params=count, macs=10 * count, first=i == 0, last=i == last,
        )
        for i, count in enumerate(params)
    ]  # fmt: skip
