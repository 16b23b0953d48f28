"""The embedded default network: a depthwise-separable CNN for scikit-learn's 8x8 digits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tap_eval.images.sources import digits
from tap_eval.kept import Kept

VERSION = 1
"""Names the trained weights in the cache: raise it when the network or its training changes."""


class DigitsCNN(nn.Module):
    """A stem, four depthwise-separable blocks and a classifier; (N, 1, 8, 8) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 16, kernel=3)
        widths = [(16, 24, 1), (24, 32, 2), (32, 48, 1), (48, 64, 2)]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(_conv(width, width, kernel=3, stride=stride, groups=width), _conv(width, out, kernel=1))
                for width, out, stride in widths
            )
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def load_digits_cnn(cache: Path) -> DigitsCNN:
    """The trained network, from `cache` or trained there once (about 10 s); raises `StorageMistake`."""
    kept, name = Kept(cache / "networks"), f"digits-cnn-v{VERSION}"
    network = DigitsCNN()
    if (weights := kept.recall(name)) is None:
        weights = _train(DigitsCNN()).state_dict()
        kept.keep(name, weights)
    network.load_state_dict(weights)
    return network.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a network trains fastest on one thread, and always to the same weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(network: DigitsCNN, seed: int = 0, epochs: int = 60, batch: int = 64) -> DigitsCNN:
    """Trains on the source's training rows, which no split shares, with shifts by up to a pixel."""
    source = digits()
    assert source.pool is not None
    images = source.decode(source.pool, None)
    everything = images.pixels
    with torch.random.fork_rng(), _one_thread():
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.reset_parameters()
        optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 1e-2, epochs=epochs, steps_per_epoch=-(-len(images) // batch)
        )
        network.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(batch):
                down, right = torch.randint(0, 3, (2,)).tolist()
                pixels = F.pad(everything[rows], (1, 1, 1, 1), value=-1.0)[..., down : down + 8, right : right + 8]
                loss = F.cross_entropy(network(pixels), images.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network
