"""Small host values on the model's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(
    values: Sequence[int] | Sequence[bool] | Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """The values on the device, int64 or bool, without waiting for what the device does."""
    tensor = torch.tensor(values, dtype=torch.int64 if len(values) == 0 else None)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # else the copy would wait
    return tensor.to(device, non_blocking=True)
