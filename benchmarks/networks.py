"""Which networks work: those of torchvision and timm, prepared, quantized and held against themselves.

    nice python -m benchmarks.networks                       # all, some hours; an interrupted sweep goes on
    nice python -m benchmarks.networks timm.levit_128s ...   # some

Weights are random, statistics of batch normalization settled by a few passes, and what begins as a
constant is made random, so that nothing hides behind a zero. Each network has a process of its own
and one thread. What was found goes to a file of JSON lines, from which the table is made; what was
found without fault is not done again.

A fault, after which the exit code is 1, is a difference that the program does not tell of: outputs on
images that preparing has not seen, layers that do not run, operations against the formulas of
`torch.utils.flop_counter`, parameters that are nowhere, both paths of the quantized network. So is a
crash, and more than 5 % of the weights in float but for those of LSTMs.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.operations import Operations, plain_attention
from tap_eval.images.images import Images, Splits, Transform
from tap_eval.kept import Kept
from tap_eval.measuring.measurer import Measurer
from tap_eval.measuring.recipe import Bounds, Recipe
from tap_eval.mistake import Mistake
from tap_eval.preparing.prepare import prepare
from tap_eval.preparing.prepared import Prepared
from tap_eval.preparing.program import record
from tap_eval.quantization.integer import IntegerNetwork, KeptWeights, exact
from tap_eval.quantization.quantizer import Allocation

TORCHVISION = {
    "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64,
    "googlenet": 64, "inception_v3": 96, "maxvit_t": 224, "mnasnet1_0": 64, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "regnet_y_400mf": 64, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64,
    "shufflenet_v2_x1_0": 64, "squeezenet1_1": 64, "swin_b": 224, "swin_t": 224, "swin_v2_t": 256, "vgg11_bn": 64,
    "vit_b_16": 224, "wide_resnet50_2": 64,
}  # fmt: skip
TIMM = {
    "beit_base_patch16_224": 224, "botnet26t_256": 256, "cait_xxs24_224": 224, "coat_lite_tiny": 224,
    "coat_tiny": 224, "convit_tiny": 224, "convmixer_768_32": 64, "convnextv2_atto": 64, "crossvit_tiny_240": 240,
    "cs3darknet_s": 64, "cspresnet50": 64, "davit_tiny": 64, "deit_tiny_patch16_224": 224,
    "deit_base_patch16_224": 224, "deit_tiny_distilled_patch16_224": 224, "dla34": 64, "dm_nfnet_f0": 64, "dpn48b": 64,
    "eca_nfnet_l0": 64,
    "edgenext_small": 64, "efficientformer_l1": 224, "efficientformerv2_s0": 224, "efficientvit_b0": 64,
    "efficientvit_m0": 224, "ese_vovnet19b_dw": 64, "eva02_tiny_patch14_224": 224, "fasternet_t0": 64,
    "fastvit_t8": 64, "focalnet_tiny_srf": 64, "gcvit_xxtiny": 224, "gernet_s": 64, "ghostnet_100": 64,
    "gmixer_24_224": 224, "gmlp_s16_224": 224, "halonet26t": 256, "hardcorenas_a": 64, "hgnetv2_b0": 64,
    "hiera_tiny_224": 224, "hrnet_w18_small": 64, "inception_next_tiny": 64, "inception_resnet_v2": 96,
    "inception_v4": 96, "lambda_resnet26t": 256, "lcnet_050": 64, "levit_128s": 224, "mambaout_femto": 64,
    "maxvit_pico_rw_256": 256, "mixer_s32_224": 224, "mobilenetv4_conv_small": 64, "mobilenetv4_hybrid_medium": 128,
    "mobileone_s0": 64, "mobilevit_s": 64, "mobilevitv2_050": 64, "mvitv2_tiny": 224, "naflexvit_base_patch16_gap": 224,
    "nest_tiny": 224, "nextvit_small": 64, "pit_ti_224": 224, "poolformer_s12": 64,
    "pvt_v2_b0": 64, "rdnet_tiny": 64, "regnetz_005": 64, "repghostnet_050": 64, "repvgg_a0": 64, "repvit_m0_9": 64,
    "res2net50_14w_8s": 64, "resmlp_12_224": 224, "resnest14d": 64, "resnetv2_50x1_bit": 64, "rexnet_100": 64,
    "selecsls42b": 64, "sequencer2d_s": 224, "seresnet18": 64, "shvit_s1": 64, "skresnet18": 64, "starnet_s1": 64,
    "swiftformer_xs": 224, "swinv2_cr_tiny_ns_224": 224, "tf_efficientnet_cc_b0_4e": 64, "tf_efficientnet_lite0": 64,
    "tf_mixnet_s": 64, "tiny_vit_5m_224": 224, "tnt_s_patch16_224": 224, "tresnet_m": 64, "twins_svt_small": 64,
    "visformer_tiny": 224, "vit_relpos_small_patch16_224": 224, "vitamin_small_224": 224, "volo_d1_224": 224,
    "xception41": 96, "xcit_nano_12_p16_224": 224,
}  # fmt: skip
NETWORKS = {f"torchvision.{name}": pixels for name, pixels in TORCHVISION.items()} | {
    f"timm.{name}": pixels for name, pixels in TIMM.items()
}
"""side of the images, the smallest at which each runs"""
TOLERANCE = 1e-4
"""of the largest logit, or ten times what float32 itself is off, where that is more"""
_LEAST_SHARE = 0.95  # of the weights
_MOST_APART = 2
"""times what 8 bits cost: so far may both paths come apart where single roundings grow through a deep network"""
_SHOWN, _CALIBRATED, _JUDGED = 2, 16, 32
"""images on which preparing finds layers, which give ranges, on which the quantized network is judged"""


def main() -> int:
    """Prints a Markdown table; 1 when something is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="as timm.levit_128s; without any, all that are listed here")
    parser.add_argument("--pixels", type=int, help="side of the images, by default each network's own")
    parser.add_argument("--results", type=Path, default=Path("networks.jsonl"))
    parser.add_argument("--limit", type=float, default=1800, help="seconds a network")
    parser.add_argument("--here", action="store_true", help="one network in this process, and JSON of it")
    chosen = parser.parse_args()
    if chosen.here:
        (name,) = chosen.networks
        print(json.dumps(examined(name, chosen.pixels)))
        return 0
    names = chosen.networks or list(NETWORKS)
    found = _read(chosen.results)
    for name in names:
        if name not in found or found[name]["faults"]:
            found[name] = _in_a_process(name, chosen.pixels or NETWORKS[name], chosen.limit)
            with chosen.results.open("a") as file:
                file.write(json.dumps(found[name]) + "\n")
            print(f"{name}: {_remark(found[name]) or 'no remark'}", file=sys.stderr, flush=True)
    rows = [found[name] for name in names]
    print(table(rows))
    return int(any(row["faults"] for row in rows))


def _read(results: Path) -> dict[str, dict[str, Any]]:
    """What was found last of each network."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {row["network"]: row for row in map(json.loads, lines)}


def _in_a_process(name: str, pixels: int, limit: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.networks", name, "--pixels", str(pixels), "--here"]
    row: dict[str, Any] = {"network": name, "pixels": pixels}
    try:
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=limit,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return row | {"faults": [f"took more than {limit:.0f} s"]}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return row | {"faults": [f"crashed: {last}"], "said": done.stderr[-4000:]}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


@torch.no_grad()
def examined(name: str, pixels: int) -> dict[str, Any]:
    """What is found of one network; `faults` are sentences."""
    started = time.perf_counter()
    network = built(name, pixels)
    splits = Splits(name, (), (noise(_CALIBRATED, pixels, 1),), noise(_JUDGED, pixels, 2), noise(1, pixels, 3))
    calibration, search = splits.calibrations[0].pixels, splits.search.pixels
    settle(network, calibration)
    network(calibration)
    began = time.perf_counter()
    network(calibration)
    row: dict[str, Any] = {"pass_s": time.perf_counter() - began, "network_mib": _peak(), "faults": []}
    began = time.perf_counter()
    try:
        prepared = prepare(network, calibration[:_SHOWN], [calibration])
    except Mistake as mistake:
        return row | {"refused": str(mistake)}
    row |= {"prepare_s": time.perf_counter() - began, "prepared_mib": _peak(), "notes": list(prepared.notes)}
    row |= quantized(network, prepared, splits)
    row |= {"seconds": time.perf_counter() - started, "peak_mib": _peak()}
    row |= outputs(network, prepared, [search[:5], torch.randn(3, 3, pixels, pixels), search[5:6]])
    fused = sum(p.numel() for p in network.parameters()) != sum(p.numel() for p in prepared.network.parameters())
    whole = prepared.network if fused else network
    row |= operations(whole, prepared, search[8:10]) | parameters(whole, prepared)
    row["faults"] = faults(row)
    return row


def built(name: str, pixels: int) -> nn.Module:
    """The network called so with random weights, none of them constant."""
    torch.manual_seed(0)
    library, _, short = name.partition(".")
    network: nn.Module
    if library == "timm":
        import timm

        network = timm.create_model(short, pretrained=False)
    else:
        from torchvision import models

        sized = {"vit_b_16": {"image_size": pixels}, "maxvit_t": {"input_size": (pixels, pixels)}}
        begun = {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": True}}
        network = models.get_model(short, weights=None, **(sized | begun).get(short, {}))
    for parameter in network.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            spread = 0.2 if parameter.dim() < 2 else 1 / math.sqrt(parameter[0].numel())
            parameter.data += spread * torch.randn_like(parameter)
    return network.eval()


def settle(network: nn.Module, pixels: Tensor) -> None:
    """Gives batch normalization the statistics of random images, (N, C, H, W).

    Some more variance keeps channels that hardly vary from blowing up what float32 rounds.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all passes
        norm.train()
    for part in pixels.split(len(pixels) // 2) if norms else ():
        network(part)
    for norm in norms:
        norm.running_var += 0.05 * norm.running_var.mean()
        norm.eval()


def noise(count: int, pixels: int, seed: int) -> Images:
    """Noise of many sizes, each image with a mixture, a colour and a contrast of its own."""
    source = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, pixels, pixels)
    for cells in (2, 4, 8, 16, pixels):
        noise = torch.randn(count, 3, cells, cells, generator=source)
        amount = 2 * torch.rand(count, 1, 1, 1, generator=source)
        total += amount * F.interpolate(noise, (pixels, pixels), mode="bilinear")
    contrast = torch.rand(count, 1, 1, 1, generator=source) * 40 + 10
    colour = torch.rand(count, 3, 1, 1, generator=source) * 160 + 48
    stored = (total * contrast + colour).clamp(0, 255).to(torch.uint8).numpy()
    return Images(stored, torch.zeros(count, dtype=torch.int64), Transform())


def _peak() -> float:
    """MiB that this process has taken at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def outputs(network: nn.Module, prepared: Prepared, batches: Sequence[Tensor]) -> dict[str, Any]:
    """The largest difference of the prepared network, what float32 itself is off from float64, and idle layers."""
    difference = rounding = 0.0
    idle: set[str] = set()
    wide = copy.deepcopy(network).double()
    for batch in batches:
        expected = prepared.output.logits(network(batch))
        calls = [0] * len(prepared.layers)
        got = prepared(batch, [_counted(module, calls, index) for index, module in enumerate(prepared.modules)])
        idle |= {layer.name for layer in prepared.layers if not calls[layer.index]}
        difference = max(difference, _apart(got, expected))
        try:
            rounding = max(rounding, _apart(expected, prepared.output.logits(wide(batch.double())).float()))
        except RuntimeError:  # code that takes float32 alone
            continue
    return {"difference": difference, "rounding": rounding, "idle": sorted(idle)}


def _counted(module: Callable[[Tensor], Tensor], calls: list[int], index: int) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        calls[index] += 1
        return module(x)

    return call


def _apart(got: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    found = float((got - expected).abs().max() / expected.abs().max())
    return found if math.isfinite(found) else math.inf


def operations(network: nn.Module, prepared: Prepared, pixels: Tensor) -> dict[str, Any]:
    """Multiply-accumulates an image: those of the layers, as they say themselves, and what is counted."""
    with plain_attention():
        with Operations(network, pixels) as whole:
            network(pixels)
        with Operations(prepared.network, pixels) as outside:
            prepared(pixels, [outside.around(module) for module in prepared.modules])
    return {
        "macs": sum(layer.macs for layer in prepared.layers),
        "macs_of_weights": whole.of_weights / len(pixels),
        "macs_outside": outside.of_weights / len(pixels),
        "macs_of_activations": whole.of_activations / len(pixels),
    }


def parameters(network: nn.Module, prepared: Prepared) -> dict[str, Any]:
    """Elements in layers and elsewhere; `nowhere` are those in no layer, bias, scale, folded norm or rest."""
    rest, names = {each.name for each in prepared.rest}, {layer.name for layer in prepared.layers}
    folded = set(prepared.folded.values())
    held = dict(network.named_parameters())
    held |= {name: buffer for name, buffer in network.named_buffers() if name in names}  # fixed filters
    weights = sum(
        tensor.numel()
        for name, tensor in held.items()
        if name not in rest
        and name.rpartition(".")[0] not in folded
        and (tensor.numel() > len(tensor) or tensor.dim() == 2)
    )
    reasons: Counter[str] = Counter()
    for each in prepared.rest:
        reasons[each.reason] += each.count
    layers = sum(layer.params for layer in prepared.layers)
    return {
        "layers": len(prepared.layers), "weights": layers, "nowhere": weights - layers, "rest": reasons,
        "share_left": prepared.share_left, "norms_folded": len(folded),
        "norms_apart": len({each.name.rpartition(".")[0] for each in prepared.rest if "batch_norm" in each.reason}),
    }  # fmt: skip


def quantized(network: nn.Module, prepared: Prepared, splits: Splits) -> dict[str, Any]:
    """The network at 8 bits on both paths; its weights at 7 where this CPU lacks VNNI."""
    count = len(prepared.layers)
    bits = 8 if exact() else 7  # which any CPU multiplies exactly
    allocation = Allocation((bits,) * count, (8,) * count)
    recipe = Recipe("nearest", (bits,), splits.name, Kept(None))
    measurer = Measurer(prepared, splits, allocation, Bounds(batch=prepared.batch), recipe)
    simulated, search = measurer.network(0), splits.search.pixels
    calls = [0] * count
    for index, layer in enumerate(simulated.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    simulated.choose(allocation)
    expected = torch.cat([prepared.output.logits(network(part)) for part in search.split(prepared.batch)])
    got = simulated.logits(search, prepared.batch)
    row = {
        "idle_at_8_bits": [layer.name for layer in prepared.layers if not calls[layer.index]],
        "cosine": float(F.cosine_similarity(got, expected).mean()), "same": _same(got, expected),
        "bits_mean": float((got - expected).abs().mean() / expected.abs().max()), "unfit": measurer.unfit,
    }  # fmt: skip
    try:
        program = record(prepared, search[:1].expand(prepared.batch, *search.shape[1:]).contiguous())
        integers = IntegerNetwork(simulated, program, allocation.activations, KeptWeights(2**30))
        integers.choose(allocation)
        other = integers.logits(search)
    except Exception as error:  # noqa: BLE001 - whatever it raises is why `measurer.unfit` says that it does not fit
        return row | {"error": f"{type(error).__name__}: {error}"[:500]}
    apart = (other - got).abs() / expected.abs().max()
    return row | {"paths_max": float(apart.max()), "paths_mean": float(apart.mean()), "paths_same": _same(other, got)}


def _same(one: Tensor, other: Tensor) -> float:
    """The share of the images that are in the same class."""
    return float((one.argmax(1) == other.argmax(1)).double().mean())


def faults(row: dict[str, Any]) -> list[str]:
    """What differs without a word, and weights in float that should not be."""
    found = []
    if not row["difference"] <= max(TOLERANCE, 10 * row["rounding"]):
        found.append(f"outputs differ by {row['difference']:.0e} of the largest logit")
    if idle := row["idle"] + row["idle_at_8_bits"]:
        found.append(f"layers do not run: {', '.join(idle[:3])}")
    if abs(row["macs"] + row["macs_outside"] - row["macs_of_weights"]) > 1e-6 * row["macs_of_weights"]:
        found.append(f"{row['macs'] + row['macs_outside']:,.0f} operations, not {row['macs_of_weights']:,.0f}")
    apart = row.get("paths_mean", math.inf)
    if row["unfit"] is None and apart > _MOST_APART * row["bits_mean"]:
        found.append(f"both paths differ by {apart:.0e} where 8 bits cost {row['bits_mean']:.0e}")
    if row["nowhere"]:
        found.append(f"{row['nowhere']:,} parameters are nowhere")
    if _share(row) < _LEAST_SHARE:
        found.append(f"{100 * (1 - _share(row)):.1f} % of the weights stay in float")
    return found


def _share(row: dict[str, Any]) -> float:
    """The share of the weights that is quantized, LSTMs left out."""
    left = sum(count for reason, count in row["rest"].items() if reason not in ("", "lstm"))
    return row["weights"] / (row["weights"] + left)


_COLUMNS = (
    "network", "pixels", "layers", "weights", "operations", "difference", "float32", "cosine", "same class",
    "both paths", "s to prepare", "s", "MiB", "remarks",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The Markdown table; a network that does not get so far has a remark alone."""
    lines = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for row in rows:
        cells = [""] * (len(_COLUMNS) - 3)
        if "layers" in row:
            macs = row["macs_of_weights"] + row["macs_of_activations"]
            cells = [
                f"{row['layers']}", _percent(1 - row["share_left"]), _percent(row["macs"] / macs),
                _small(row["difference"]), _small(row["rounding"]), f"{row['cosine']:.4f}", _percent(row["same"]),
                _small(row["paths_mean"]) if "paths_mean" in row else "", f"{row['prepare_s']:.1f}",
                f"{row['seconds']:.0f}", f"{row['peak_mib']:,.0f}",
            ]  # fmt: skip
        lines.append((row["network"], str(row["pixels"]), *cells, _remark(row)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _small(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def _remark(row: dict[str, Any]) -> str:
    """Faults, why it is refused, what leaves more than a hundredth of the weights in float, and the program's notes."""
    rest = {reason: count for reason, count in row.get("rest", {}).items() if reason}
    whole = row.get("weights", 0) + sum(rest.values())
    left = [f"{reason} {_percent(count / whole)}" for reason, count in rest.items() if count > whole / 100]
    simulated = f"simulated alone: {row['unfit']}" if row.get("unfit") else ""
    told = f"in float: {', '.join(left)}" if left else ""
    return "; ".join(filter(None, [*row["faults"], row.get("refused"), told, *row.get("notes", ()), simulated]))


if __name__ == "__main__":
    sys.exit(main())
