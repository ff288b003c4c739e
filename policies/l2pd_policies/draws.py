"""Random numbers of policies, from each row's own generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.policy import DenoisingStep


def uniform(step: DenoisingStep, name: str, otherwise: str = "") -> Tensor:
    """(B, L) float32 in [0, 1), for the policy of this name.

    Raises L2PDError, which ends with `otherwise`, if the rows have no generators.
    """
    length, device = step.masked.shape[1], step.masked.device
    each = _generators(step, name, otherwise)
    return torch.stack([torch.rand(length, generator=g, device=device) for g in each])


def exponential(step: DenoisingStep, name: str, otherwise: str = "") -> Tensor:
    """(B, L) float32, exponentially distributed with rate 1; as `uniform`."""
    length, device = step.masked.shape[1], step.masked.device
    empty = [torch.empty(length, device=device) for _ in range(step.masked.shape[0])]
    each = zip(empty, _generators(step, name, otherwise), strict=True)
    return torch.stack([row.exponential_(generator=generator) for row, generator in each])


def _generators(step: DenoisingStep, name: str, otherwise: str) -> Sequence[torch.Generator]:
    if step.generator is None:
        raise L2PDError(f"{name} draws positions at random: pass a seed{otherwise}")
    return step.generator
