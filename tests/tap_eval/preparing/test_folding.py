"""A norm is folded where that changes nothing, and is taken back where it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tap_eval.preparing.equivalence import TOLERANCE
from tap_eval.preparing.prepare import prepare
from tests.tap_eval.preparing.networks import Net, NormAct, assert_all_run_quantized, checked, randomized


class TokensNorm(nn.Module):
    """Batch normalization of a linear layer's features, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x).relu_()


class ChannelsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


class Twice(nn.Module):
    """A convolution and its norm, both called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x))))


class Shared(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), read

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.read(y)
        return self.norm(y) + z


@pytest.mark.parametrize(
    ("body", "width", "tokens", "folded"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8)), 8, False, ["body.1"]),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.BatchNorm2d(8, affine=False)),
            8,
            False,
            ["body.2"],
        ),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3, 2), nn.BatchNorm2d(8)), 8, False, ["body.1"]),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), 8, False, ["body.2"]),
        (TokensNorm, 8, True, ["body.norm"]),
        (ChannelsFirst, 8, True, ["body.norm"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)), 8, False, []),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8)), 8, False, []),
        (Twice, 3, False, []),
        (lambda: Shared(lambda y: y), 8, False, []),
        (lambda: Shared(torch.relu), 8, False, []),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Unflatten(1, (4, 2)), nn.BatchNorm2d(4), nn.Flatten(1, 2)
            ),
            8,
            False,
            [],
        ),
    ],
    ids=[
        "with activation",
        "behind dropout",
        "transposed",
        "one axis",
        "tokens",
        "channels first",
        "behind an activation",
        "behind one in place",
        "called twice",
        "added to its input",
        "read by another",
        "of other channels",
    ],
)
def test_a_norm_is_folded_where_it_alone_reads_its_layer(
    body: Callable[[], nn.Module], width: int, tokens: bool, folded: list[str]
) -> None:
    torch.manual_seed(0)
    prepared = checked(Net(body(), width, tokens))
    assert list(prepared.folded.values()) == folded
    assert_all_run_quantized(prepared)


def test_a_fold_is_exact_where_images_show_little_of_it() -> None:
    class Gated(nn.Module):
        """A branch that opens for bright images."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), NormAct(8)

        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(20 * x.mean((1, 2, 3), keepdim=True) - 10)
            x = self.stem(x)
            return x + gate * self.norm(self.conv(x))

    torch.manual_seed(0)
    network = randomized(Net(Gated(), 8))
    dark, bright = torch.rand(2, 3, 16, 16) * 0.1, torch.rand(8, 3, 16, 16) + 0.5
    prepared = prepare(network, dark)
    with torch.no_grad():
        assert torch.allclose(prepared(bright), network(bright), atol=1e-5)


def test_a_fold_that_changes_outputs_is_taken_back_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that another step reads unseen: the check of outputs finds it, and only that norm stays apart."""

    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.first(x))
            with torch._C.DisableTorchFunction():
                more = y.mean()
            return self.norm(y) * more

    torch.manual_seed(0)
    prepared = checked(Net(Unseen(), 8))
    assert list(prepared.folded.values()) == ["body.first.1"]
    assert prepared.notes == ("body.norm stays apart: folded, it would change outputs",)


class Sensitive(nn.Module):
    """Each stage makes more of a difference: what float32 rounds of the first is past noise in the last."""

    def __init__(self, unseen: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if place == 0 else 8, 8, 3, padding=1) for place in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(6))
        self.unseen = unseen

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = conv(x)
            x = torch.sin(20 * norm(y))
            if self.unseen:
                with torch._C.DisableTorchFunction():
                    x = x * y.mean()
        return x


def test_norms_are_folded_in_a_network_that_is_sensitive_to_rounding_and_that_is_said_once() -> None:
    torch.manual_seed(0)
    network, images = randomized(Net(Sensitive(False), 8)), torch.randn(4, 3, 16, 16)
    prepared = prepare(network, images)
    assert list(prepared.folded.values()) == [f"body.norms.{place}" for place in range(6)]
    (note,) = prepared.notes
    assert "sensitive to rounding" in note
    with torch.no_grad():
        expected = network(images)
        wide = prepared(images) - expected
    assert wide.abs().max() > TOLERANCE * expected.abs().max(), "no case of what is tested here"


def test_a_wrong_fold_is_taken_back_in_a_network_that_is_sensitive_to_rounding() -> None:
    torch.manual_seed(0)
    prepared = prepare(randomized(Net(Sensitive(True), 8)), torch.randn(4, 3, 16, 16))
    assert not prepared.folded
    assert "body.norms.0, body.norms.1, body.norms.2, body.norms.3 and 2 more stay apart" in prepared.notes[0]
