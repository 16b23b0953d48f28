"""Names for what is measured: digests of a network's weights, and of all that it computes."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from tap_eval.preparing.prepared import Prepared


def of_weights(prepared: Prepared) -> str:
    """Names the tensors by their names and values, BatchNorm folded; the same on every machine."""
    content = hashlib.sha256()
    folded = {layer.name: module.weight for layer, module in zip(prepared.layers, prepared.modules, strict=True)}
    for name, tensor in (*folded.items(), *prepared.network.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:32]


def of_network(prepared: Prepared, outputs: Tensor) -> str:
    """Names structure and weights, BatchNorm folded, and what the code makes of images: `outputs` (N, classes)."""
    content = hashlib.sha256(str(prepared.network).encode())
    for layer, module in zip(prepared.layers, prepared.modules, strict=True):
        content.update(f"{layer}{module}".encode())
        content.update(module.weight.numpy().tobytes())
    for name, tensor in prepared.network.state_dict().items():
        content.update(name.encode())
        content.update(tensor.contiguous().numpy().tobytes())
    least, greatest = outputs.min(1), outputs.max(1)
    rounded = [f"{value:.3g}" for value in torch.cat([least.values, greatest.values]).tolist()]
    content.update(json.dumps([rounded, least.indices.tolist(), greatest.indices.tolist()]).encode())
    return content.hexdigest()[:32]
