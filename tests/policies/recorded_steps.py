"""A denoising step as trajectories have it."""

from __future__ import annotations

import torch

from l2pd_plugins import DenoisingStep
from l2pd_plugins.trajectories import Trajectories


def recorded(step: DenoisingStep, entropy: torch.Tensor, margin: torch.Tensor) -> Trajectories:
    """The step of prompts that are its rows, each in its first block; every prediction at a masked
    position is right."""
    zeros = torch.zeros(len(step.masked), dtype=torch.int64)
    shown = {name: getattr(step, name) for name in ("masked", "present", "confidence")}
    return Trajectories(
        prompt=torch.arange(len(zeros)),
        policy=zeros,
        block=zeros,
        step=step.step_index,
        x0=step.x0.to(torch.int32),
        entropy=entropy,
        margin=margin,
        correct=step.masked,
        **shown,
    )
