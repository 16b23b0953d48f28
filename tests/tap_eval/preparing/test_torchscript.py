"""TorchScript networks compute the same when they are read, and show their products and parameters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from tap_eval.mistake import NetworkMistake
from tap_eval.preparing.torchscript import readable

PRODUCTS = (torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, F.linear)


def settled(network: nn.Module) -> nn.Module:
    """In eval mode, with statistics in its norms that are not the initial ones."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return network.eval()


class Products(TorchFunctionMode):
    """Notes the names of the parameters that are weights of products; None for a weight that is no parameter."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.weights: list[str | None] = []
        self.functions: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.add(func)
        if func in PRODUCTS:
            self.weights.append(self.names.get(id(args[1])))
        return func(*args, **(kwargs or {}))


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(72, 5), nn.Softmax(dim=1)),
        )


class Ways(nn.Module):
    """Chooses, repeats, collects and remembers by what is in the images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.steps = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(4, 5)})
        self.scale = torch.tensor([0.5, 2.0])
        self.kept = {"none": torch.zeros(4)}

    def forward(self, x: Tensor, most: int = 3, extra: Tensor | None = None) -> Tensor:
        x = F.relu(self.first(x))
        x = x * self.scale[1] if bool(x.mean() > 0.3) else x - self.scale[0]
        turns = 0
        while bool(x.mean() < 2) and turns < most:
            x = x + 0.5
            turns += 1
        for step in self.steps:
            x = step(x)
        rows: list[Tensor] = []
        for index in range(x.size(0) - 1, -1, -1):
            if index == 100:
                continue
            rows.append(x[index].mean(dim=[1, 2]))
        y = torch.stack(rows)
        y[:, 0] += turns
        if "ones" not in self.kept:
            self.kept["ones"] = torch.ones(4, dtype=y.dtype)
        y = y + self.kept["ones"]
        out: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            out[name] = head(y)
        if extra is not None:
            out["a"] = out["a"] + extra
        assert y.dim() == 2, f"{y.dim()} dimensions"
        return out["a"] + out["b"]


class Kinds(nn.Module):
    """Layers whose operators take arguments in another order in Python than in TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.Conv1d(3, 3, 3, padding="same")
        self.volume = nn.Conv3d(1, 1, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1, dilation=2)
        self.reflected = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=2)
        self.norms = nn.Sequential(
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)
        )
        self.layer_norm, self.table, self.last = nn.LayerNorm(4), nn.Embedding(3, 4), nn.Linear(4, 4)
        self.activations = nn.Sequential(
            *(nn.Mish(), nn.ELU(0.5), nn.CELU(0.7), nn.LeakyReLU(0.1, inplace=True), nn.Hardswish(), nn.ReLU6()),
            *(nn.GELU(approximate="tanh"), nn.Hardtanh(-0.5, 0.7, inplace=True), nn.PReLU(), nn.Dropout()),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.sequence(x.flatten(2)).view(x.shape)
        y = self.volume(y.unsqueeze(1)).squeeze(1)
        y = self.norms(self.reflected(self.up(y))).mean((2, 3))
        y = self.activations(self.layer_norm(y) + self.table(torch.ones_like(y[:, 0]).long()))
        return torch.addmm(self.last.bias, self.last(y), y.new_ones(4, 4), beta=0.5)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.patches, self.attention = nn.Conv2d(3, 8, 4, 4), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(self.patches(x).flatten(2).transpose(1, 2))
        attended, weights = self.attention(tokens, tokens, tokens)
        assert weights is not None
        return (attended + weights.amax()).mean(1)


class Answer(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Answer:
        hidden = self.one(x[:, 0, 0])
        return Answer(self.other(hidden), hidden)


def loaded(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    return torch.jit.load(file)


def traced(network: nn.Module) -> nn.Module:
    return torch.jit.trace(network, torch.rand(2, 3, 8, 8), check_trace=False)


def frozen(network: nn.Module) -> nn.Module:
    return torch.jit.freeze(torch.jit.script(network))


def same(scripted: nn.Module, network: nn.Module, size: int = 8, batches: tuple[int, ...] = (2, 3)) -> None:
    for batch in batches:
        x = torch.rand(batch, 3, size, size)
        torch.testing.assert_close(network(x.clone()), scripted(x.clone()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("packed", [torch.jit.script, traced, frozen, loaded], ids=lambda pack: pack.__name__)
@pytest.mark.parametrize(
    ("make", "products"),
    [(Plain, 2), (Ways, 5), (Kinds, 5), (Attention, 11), (lambda: Attention(norm_first=True, activation="gelu"), 11)],
    ids=["plain", "ways", "kinds", "attention", "norm first"],
)
def test_it_computes_the_same_and_its_products_are_seen_with_their_parameters(
    make: Callable[[], nn.Module], products: int, packed: Callable[[nn.Module], nn.Module]
) -> None:
    network = settled(make())
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)  # freezing makes one of what is equal
    with torch.no_grad():
        scripted = packed(network)
    read = readable(scripted)
    for gradients in (False, True):  # without them attention is one operator
        with torch.set_grad_enabled(gradients):
            same(scripted, read, batches=(2,) if packed is traced and make is Ways else (2, 3))
        with torch.set_grad_enabled(gradients), Products(read) as seen:
            read(torch.rand(2, 3, 8, 8))
        assert None not in seen.weights
        assert len(set(seen.weights)) == len(seen.weights) == products
    if packed is not frozen:
        parameters = dict(read.named_parameters())
        assert {name for name in parameters if not name.startswith("constant_")} == set(network.state_dict()) - {
            name for name, _ in network.named_buffers()
        }
        assert all(torch.equal(parameters[name], value) for name, value in network.named_parameters())


@pytest.mark.parametrize(
    ("name", "size", "products"),
    [("resnet18", 32, 21), ("mobilenet_v2", 32, 53), ("efficientnet_b0", 32, 82), ("googlenet", 32, 58)],
)
def test_networks_of_torchvision_run_as_they_are_scripted(name: str, size: int, products: int) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    network = settled(models.get_model(name, weights=None, num_classes=10, **options))
    scripted = torch.jit.script(network)
    read = readable(scripted)
    with torch.no_grad():
        same(scripted, read, size)
        with Products(read) as seen:
            read(torch.rand(1, 3, size, size))
    assert None not in seen.weights
    assert len(seen.weights) == products


def test_norms_and_activations_are_called_as_their_modules_call_them() -> None:
    network = settled(Plain())
    with Products(network) as eager, torch.no_grad():
        network(torch.rand(1, 3, 8, 8))
    read = readable(torch.jit.script(network))
    with Products(read) as seen, torch.no_grad():
        read(torch.rand(1, 3, 8, 8))
    wanted = {torch.conv2d, F.batch_norm, F.relu, F.linear, F.softmax}
    assert wanted <= eager.functions
    assert wanted <= seen.functions


def test_it_can_be_copied_pickled_and_cast_and_shares_nothing_with_the_scripted_network() -> None:
    scripted = torch.jit.script(settled(Plain()).bfloat16())
    read = cloudpickle.loads(cloudpickle.dumps(copy.deepcopy(readable(scripted)))).float().eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(read(x), scripted.float()(x))
    assert read(x).dtype == torch.float32
    before = copy.deepcopy(scripted.state_dict())
    for parameter in readable(scripted).parameters():
        parameter.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in scripted.state_dict().items())


def test_a_batch_norm_in_training_counts_and_averages_as_the_scripted_one() -> None:
    scripted = torch.jit.script(Plain().train())
    read = readable(scripted)
    same(scripted, read)
    for name, value in scripted.named_buffers():
        torch.testing.assert_close(read.get_buffer(name), value)
    assert int(read.get_buffer("1.num_batches_tracked")) == 2


def test_arguments_are_given_by_place_by_name_or_by_their_defaults() -> None:
    scripted = torch.jit.script(Ways().eval())
    read = readable(scripted)
    x, extra = torch.rand(2, 3, 8, 8), torch.rand(5)
    assert torch.allclose(read(x, 1, extra=extra), scripted(x, 1, extra=extra))
    for args in [(), (x, 1, extra, x)]:
        with pytest.raises(TypeError):
            read(*args)


def test_named_outputs_and_shared_parameters_stay_so() -> None:
    read = readable(loaded(Tied()))
    answer = read(torch.rand(2, 3, 8, 8))
    assert answer._fields == ("logits", "hidden")
    assert read.get_parameter("one.weight") is read.get_parameter("other.weight")


def test_a_scripted_part_of_an_eager_network_is_read_on_a_copy() -> None:
    backbone = torch.jit.script(settled(Plain()))
    network = nn.Sequential(nn.Sequential(backbone, nn.Linear(5, 2)))
    read = readable(network)
    same(network, read)
    assert network[0][0] is backbone
    with Products(read) as seen:
        read(torch.rand(1, 3, 8, 8))
    assert seen.weights == ["0.0.0.weight", "0.0.5.weight", "0.1.weight"]
    eager = Plain()
    assert readable(eager) is eager


class Ignored(nn.Module):
    @torch.jit.ignore
    def aside(self, x):
        return x * 2

    def forward(self, x):
        return self.aside(x)


def dynamically_quantized() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    return torch.ao.quantization.quantize_dynamic(network, {nn.Linear})


@pytest.mark.parametrize(
    ("pack", "make", "named"),
    [
        (torch.jit.script, Ignored, "prim::PythonOp"),
        (torch.jit.script, dynamically_quantized, "quantized.LinearPackedParams"),
        (lambda network: torch.jit.optimize_for_inference(torch.jit.script(network.eval())), Plain, "prim::"),
    ],
    ids=["Python function", "quantized", "for inference"],
)
def test_what_cannot_be_read_is_named(pack: Any, make: Any, named: str) -> None:
    with pytest.raises(NetworkMistake, match=rf"{named}.*package\.module:factory"):
        readable(pack(make()))
