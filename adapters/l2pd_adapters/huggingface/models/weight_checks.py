"""Checks of the weights that transformers has loaded."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.tensor_files import what_is_not_finite

_NAMED_AT_MOST = 5
_FINITE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are checked; others belong to quantised models."""


def check_finite(model: Any) -> None:
    """Raise L2PDError if a weight is not finite: every answer would be garbage."""
    for name, weight in model.named_parameters():
        if weight.is_meta or not weight.numel() or weight.dtype not in _FINITE:
            continue
        extremes = torch.stack(weight.detach().aminmax())  # NaN if there is one
        if not extremes.float().isfinite().all():
            raise L2PDError(
                f"the weight {name} has values that are not finite in float32: "
                f"{what_is_not_finite(extremes)}"
            )


def check_weights(found: Mapping[str, Any], name: str, ignored: tuple[str, ...] = ()) -> None:
    """Raise L2PDError if the checkpoint's weights do not match the model's: transformers
    initialises missing weights at random.
    """
    missing = sorted(found["missing_keys"])
    unexpected = sorted(
        weight
        for weight in found["unexpected_keys"]
        if not any(fnmatch(weight, pattern) for pattern in ignored)
    )
    told = [
        f"{len(names)} {what} ({', '.join(names[:_NAMED_AT_MOST])}"
        f"{', ...' if len(names) > _NAMED_AT_MOST else ''})"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"))
        if names
    ]
    if told:
        raise L2PDError(f"the weights are not those of {name}: {', '.join(told)}")
