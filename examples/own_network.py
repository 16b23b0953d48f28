"""A network of your own with images from a folder: drawn and trained here, then quantized by a proxy of its layers.

python examples/own_network.py

Replace `draw_images` by a folder of yours and `train` by your weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from tap_eval.allocation.allocator import allocate
from tap_eval.allocation.budget import Budget
from tap_eval.allocation.choices import Choices, uniform
from tap_eval.images.images import Images
from tap_eval.images.sources import open_source, split
from tap_eval.measuring.bench import Bench
from tap_eval.measuring.ledger import Ledger
from tap_eval.measuring.task import Task

SHAPES = ("circle", "cross", "square")


def draw_images(folder: Path, count: int, seed: int) -> None:
    """Writes `folder/SHAPE/NUMBER.png`, 32x32 in colour, shapes of changing size and place on noise."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        shape = SHAPES[number % 3]
        noise = torch.randint(0, 180, (32, 32, 3), generator=generator, dtype=torch.uint8)
        image = Image.fromarray(noise.numpy())
        size, right, down = torch.randint(4, 12, (3,), generator=generator).tolist()
        box = (right, down, right + 2 * size - 4, down + 2 * size - 4)
        middle = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2)
        pen = ImageDraw.Draw(image)
        if shape == "circle":
            pen.ellipse(box, outline="silver", width=2)
        elif shape == "square":
            pen.rectangle(box, outline="silver", width=2)
        else:
            pen.line((middle[0], box[1], middle[0], box[3]), fill="silver", width=2)
            pen.line((box[0], middle[1], box[2], middle[1]), fill="silver", width=2)
        (folder / shape).mkdir(parents=True, exist_ok=True)
        image.save(folder / shape / f"{number}.png")


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in torchvision's ResNets."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


class SmallResNet(nn.Module):
    """A stem, three blocks, a classifier; (N, 3, 32, 32) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Block(8, 8, 2), Block(8, 16, 2), Block(16, 32, 2))
        self.fc = nn.Linear(32, len(SHAPES))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layers(x).mean(dim=(2, 3)))


def train(network: nn.Module, images: Images, epochs: int = 10) -> nn.Module:
    """Trains on `images` for some seconds."""
    torch.set_num_threads(1)  # fastest for so small a network
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    pixels = images.pixels
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(50):
            loss = nn.functional.cross_entropy(network(pixels[rows]), images.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    """Prints each layer with its bits, and accuracies at the same size."""
    with tempfile.TemporaryDirectory() as folder:
        draw_images(Path(folder) / "train", 600, seed=0)
        draw_images(Path(folder) / "photos", 600, seed=1)
        torch.manual_seed(0)
        network = SmallResNet()
        everything = open_source(f"imagefolder:{folder}/train")
        train(network, everything.decode(range(len(everything.labels)), None))

        images = split(open_source(f"imagefolder:{folder}/photos"), calibration=None, seed=0)
        task = Task(Choices(weights=(2, 3, 4, 8)), Budget.parse("3bit"))
        bench = Bench("small ResNet", network, images, task, Ledger(Path(folder) / "measurements.sqlite"))
        scores = [float(x["weight_std"] * x["input_std"] * x["macs"] / x["params"]) for x in bench.features]
        allocation = allocate(scores, bench.layers, task.choices, bench.task.budget)
        same = uniform(bench.layers, 3)
        for layer, bits in zip(bench.layers, allocation.weights, strict=True):
            print(f"{layer.name:24} {layer.params:6,} weights  {bits} bits")
        for name, bits in (("full precision", None), ("3 bits everywhere", same), ("these bits", allocation)):
            size = bench.size(bits).total / 1024
            print(f"{name:18} {size:5.1f} KiB  {bench.measure(bits, 'test')}")


if __name__ == "__main__":
    main()
