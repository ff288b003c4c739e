"""Copying small host values to the model's device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy values (a sequence, possibly nested, or an array) to the device without waiting for it.
    Lists of whole numbers become int64; arrays keep their type.
    """
    if dtype is None and len(values) == 0:
        dtype = torch.int64
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # otherwise the copy would block
    return tensor.to(device, non_blocking=True)
