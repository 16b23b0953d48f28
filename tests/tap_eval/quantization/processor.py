"""In which order the CPU at hand scales sums of integers; single roundings fall otherwise in another."""

from __future__ import annotations

import pytest
import torch


def _as_simulated() -> bool:
    """Whether by the scale of the input first and by that of the channel then, as with VNNI; not so with AMX."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (64, 64), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-63, 64, (16, 64), generator=generator, dtype=torch.int8)
    scale, step = torch.rand(16, generator=generator), torch.tensor(0.0371)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zero = torch.zeros(16, dtype=torch.int32)
    got = torch.ops.onednn.qlinear_pointwise(
        x, float(step), 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return torch.equal(got, (x.float() @ weight.float().T) * step * scale)


SCALES_AS_SIMULATED = pytest.mark.skipif(not _as_simulated(), reason="this CPU scales sums in another order")
