"""Small networks for the digits, of which everything can be computed by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices
from tap_eval.device import CPU
from tap_eval.images.images import Splits
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task


def two_layers() -> nn.Sequential:
    """W2 relu(W1 x), without biases."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 10, bias=False)
    )


class Stopped(nn.Module):
    """Stops gradients behind its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x.flatten(1))
        return self.second(x)


class Spreads(nn.Module):
    """Looks at how far channels spread, of which one does not at all: its gradient is 0, and has no slope there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)
        nn.init.constant_(self.conv.bias[:1], -100)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x).relu().flatten(2).std(2))


class Aside(nn.Module):
    """Has a second head, which nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.aside, self.last = nn.Linear(64, 6), nn.Linear(6, 4), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x.flatten(1)).relu()
        return {"logits": self.last(x), "embedding": self.aside(x)}


class Attending(nn.Module):
    """The rows of an image attend to each other; a second head is read by nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.aside = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        rows = rows + self.attention(rows, rows, rows, need_weights=False)[0]
        self.aside(rows)
        return self.last(rows.mean(1))


class Rescaled(nn.Module):
    """Divides by how far a layer's outputs spread, without gradients of that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spread, self.last = nn.Linear(64, 6), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            spread = self.spread(x.flatten(1)).std(1, keepdim=True)
        return self.last(x.flatten(1)) / spread


def opened(
    network: nn.Module,
    splits: Splits,
    folder: Path,
    budget: str = "4bit",
    device: torch.device = CPU,
    output: str | None = None,
) -> Bench:
    """Rounded to the nearest, with a ledger of its own."""
    task = Task(Choices(), Budget.parse(budget), rounding="nearest", sums="float")
    return Bench("small", network.eval(), splits, task, Ledger(folder / "ledger.sqlite"), device=device, output=output)


def by_hand(bench: Bench) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the calibration images x (N, 64): x, W1, W2, the hidden values (N, 6), and the loss's gradient by logits."""
    x = bench.splits.calibrations[0].pixels.flatten(1).double()
    first, second = (module.weight.detach().double() for module in bench.prepared.modules)
    hidden = (x @ first.T).clamp_min(0)
    shares = (hidden @ second.T).softmax(1)
    wanted = torch.eye(10, dtype=torch.float64)[bench.splits.calibrations[0].labels]
    return x, first, second, hidden, (shares - wanted) / len(x)
