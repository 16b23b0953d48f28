"""Trains a small network on CIFAR-10, so that kinds of layers are measured on networks that know something.

    PYTHONPATH=. python benchmarks/train.py vit_tiny_cifar --images parquet:data/cifar10-train.parquet
        --held-out parquet:data/cifar10-val.parquet --out data/vit_tiny_cifar.safetensors
    PYTHONPATH=. python benchmarks/train.py mobilenet_cifar --images parquet:data/cifar10-train.parquet
        --held-out parquet:data/cifar10-val.parquet --out data/mobilenet_cifar.safetensors

The file is a state dict of the function of that name here: `--network benchmarks.train:vit_tiny_cifar --weights FILE`.
The same seed, threads and machine give the same weights, on a CPU. None are in the repository.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNetV2

from tap_eval.device import chosen as devices
from tap_eval.device import found
from tap_eval.images.images import AS_THEY_ARE
from tap_eval.images.sources import open_source

CLASSES = 10
_STEP, _DECAY = 2e-3, 0.05
_PADDED = 4  # pixels


class Block(nn.Module):
    """A transformer's block, normalized before attention and before the MLP."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to the same."""
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Of 32 x 32 images in patches of 4, whose tokens are averaged in the end."""

    def __init__(self, width: int = 128, depth: int = 6, heads: int = 4, inner: int = 256) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads, inner) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) to (N, classes)."""
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit_tiny_cifar() -> nn.Module:
    """A vision transformer of 0.8 million weights."""
    return VisionTransformer()


def mobilenet_cifar() -> nn.Module:
    """MobileNetV2 whose first two strides are 1, narrower and with fewer blocks."""
    stages = [[1, 16, 1, 1], [4, 24, 2, 1], [4, 32, 2, 2], [4, 64, 3, 2], [4, 96, 2, 1]]
    network = MobileNetV2(CLASSES, inverted_residual_setting=stages, dropout=0.0)
    network.features[0][0].stride = (1, 1)
    return network


NETWORKS = {"vit_tiny_cifar": vit_tiny_cifar, "mobilenet_cifar": mobilenet_cifar}


def read(spec: str) -> tuple[Tensor, Tensor]:
    """All images (N, 3, 32, 32) uint8 of a source, and their labels."""
    source = open_source(spec)
    cut = AS_THEY_ARE.cut(3)
    return torch.stack([cut(source.read(row)) for row in range(len(source.labels))]), torch.tensor(source.labels)


def augmented(pixels: Tensor, chance: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels and half of them mirrored, (N, 3, S, S) uint8."""
    count, side = len(pixels), pixels.shape[-1]
    wide = F.pad(pixels, (_PADDED,) * 4)
    below, right = torch.randint(2 * _PADDED + 1, (2, count, 1), generator=chance) + torch.arange(side)
    mirrored = torch.rand(count, 1, generator=chance) < 0.5
    right = torch.where(mirrored, right.flip(1), right)
    rows = torch.arange(count).view(-1, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1)
    places = (*rows, below[:, None, :, None], right[:, None, None])
    return wide[tuple(place.to(pixels.device) for place in places)]


def train(network: nn.Module, pixels: Tensor, labels: Tensor, epochs: int, batch: int, seed: int) -> None:
    """By AdamW and one cycle of the step size, on the device where all of them are."""
    chance = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=_DECAY)
    steps = epochs * (len(pixels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _STEP, total_steps=steps)
    network.train()
    for epoch in range(epochs):
        losses, started = [], time.perf_counter()
        for rows in torch.randperm(len(pixels), generator=chance).split(batch)[: len(pixels) // batch]:
            x = AS_THEY_ARE.normalize(augmented(pixels[rows], chance)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(pixels.device.type, torch.bfloat16):
                loss = F.cross_entropy(network(x).float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        print(f"epoch {epoch + 1}: loss {mean:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    network.eval()


@torch.inference_mode()
def top1(network: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """In full precision, in [0, 1]."""
    right = [
        (network(AS_THEY_ARE.normalize(part)).argmax(1) == its).sum()
        for part, its in zip(pixels.split(500), labels.split(500), strict=True)
    ]
    return int(sum(right)) / len(pixels)


def main() -> None:
    """Trains, writes, and says how many images that were held out are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--images", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    chosen = parser.parse_args()
    device = devices(chosen.device, found())[0]
    torch.manual_seed(chosen.seed)
    network = NETWORKS[chosen.network]().to(device, memory_format=torch.channels_last)  # a quarter faster on a CPU
    pixels, labels = read(chosen.images)
    train(network, pixels.to(device), labels.to(device), chosen.epochs, chosen.batch, chosen.seed)
    network.to("cpu", memory_format=torch.contiguous_format)
    save_file(network.state_dict(), chosen.out)
    pixels, labels = read(chosen.held_out)
    print(f"top-1 {100 * top1(network, pixels, labels):.1f} % of {len(pixels):,} images that were held out")


if __name__ == "__main__":
    main()
