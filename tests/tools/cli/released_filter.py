"""A filter like those that the authors have released, for a block of any length."""

from __future__ import annotations

import torch


def released(length=32, **changes):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "0.weight": torch.randn(length, length, generator=generator),
        "0.bias": torch.randn(length, generator=generator),
        "2.weight": torch.randn(length, length, generator=generator),
        "2.bias": torch.randn(length, generator=generator),
    }
    weights.update(changes)
    return {k: v for k, v in weights.items() if v is not None}
