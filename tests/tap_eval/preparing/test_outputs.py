"""The logits are found in whatever a network returns, or the sentence says what is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.prepare import prepare


@dataclass
class Returned:
    embedding: Tensor
    logits: Tensor


class Pair(NamedTuple):
    scores: Tensor
    features: Tensor


class Net(nn.Module):
    def __init__(self, give: Callable[[Tensor, Tensor], Any], classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.give = nn.Conv2d(3, 8, 3), nn.Linear(8, classes), give

    def forward(self, x: Tensor) -> Any:
        features = self.conv(x).mean((2, 3))
        return self.give(self.head(features), features)


@pytest.mark.parametrize(
    ("give", "key"),
    [
        (lambda y, f: y, None),
        (lambda y, f: {"logits": y, "features": f}, None),
        (lambda y, f: {"out": y, "maps": f[:, :, None, None].expand(-1, -1, 2, 2)}, None),
        (lambda y, f: {"out": {"head": y}}, None),
        (lambda y, f: (y, f), None),
        (lambda y, f: Returned(f, y), None),
        (lambda y, f: Pair(y, f), None),
        (lambda y, f: [y], None),
        (lambda y, f: y[:, :, None, None], None),
        (lambda y, f: {"first": y, "second": -y}, "first"),
        (lambda y, f: (-y, y), "1"),
    ],
    ids=[
        "tensor",
        "dict",
        "dict of maps",
        "dict in a dict",
        "tuple",
        "dataclass",
        "named tuple",
        "list",
        "(N, C, 1, 1)",
        "named by key",
        "named by place",
    ],
)
def test_logits_are_found_wherever_they_are(give: Callable[[Tensor, Tensor], Any], key: str | None) -> None:
    network, x = Net(give).eval(), torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        expected = network.head(network.conv(x).mean((2, 3)))
        assert torch.allclose(prepare(network, x, classes=5, output=key)(x), expected, atol=1e-6)


@pytest.mark.parametrize("give", [lambda y, f: y, lambda y, f: y[:, 0]], ids=["(N, 1)", "(N,)"])
def test_one_logit_tells_two_classes_apart_by_its_sign(give: Callable[[Tensor, Tensor], Any]) -> None:
    network, x = Net(give, classes=1).eval(), torch.randn(16, 3, 8, 8)
    logits = prepare(network, x, classes=2)(x)
    with torch.no_grad():
        z = network.head(network.conv(x).mean((2, 3)))[:, 0]
    assert logits.argmax(1).tolist() == (z > 0).long().tolist()
    assert torch.allclose(logits.softmax(1)[:, 1], z.sigmoid(), atol=1e-6)


@pytest.mark.parametrize(
    ("give", "key", "words"),
    [
        (lambda y, f: (y, y), None, r"a tuple of 0 \(4, 5\), 1 \(4, 5\).*--output, one of 0, 1"),
        (lambda y, f: {"maps": f[:, :, None, None].expand(-1, -1, 2, 2)}, None, r"maps \(4, 8, 2, 2\) for 4 images"),
        (lambda y, f: y.argmax(1), None, "a tensor of logits"),
        (lambda y, f: "none", None, "a str of no tensor"),
        (lambda y, f: {"a": y, "b": y}, "c", "--output c.*take one of a, b"),
    ],
    ids=["two", "no logits", "classes", "no tensor", "unknown key"],
)
def test_what_has_no_logits_is_said(give: Callable[[Tensor, Tensor], Any], key: str | None, words: str) -> None:
    with pytest.raises(NetworkMistake, match=words):
        prepare(Net(give).eval(), torch.rand(4, 3, 8, 8), classes=5, output=key)
