"""CORA-Diff: confidence and persistence."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy


@options
class Cora(UnmaskPolicy):
    """Unmask what is confident and has been predicted before.

    A position is taken at confidence >= `threshold` if its prediction is the same as in each of the
    last `persistence` steps.

    Source: CORA-Diff, arXiv 2608.11235, defaults 0.65 and 1 (calibrated on GSM8K). Its end-of-text
    truncation is the engine's business here (`end_of_text`).
    """

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.65
    persistence: Annotated[int, Field(ge=0)] = 1

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        shape = (batch_size, block_length)
        return {
            "x0": torch.full(shape, -1, dtype=torch.int64, device=device),
            "stood": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        stood = torch.where(step.x0 == state["x0"], state["stood"] + 1, 0)
        state.update(x0=step.x0, stood=stood)
        return step.masked & (step.confidence >= self.threshold) & (stood >= self.persistence)
