"""CORA-Diff: confidence and persistence."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import UpTo, policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy


@policy_options
class Cora(UnmaskPolicy):
    """Unmask confident positions whose prediction was the same in the steps before.

    A position is unmasked at confidence >= `threshold` if its prediction is the same as in each of
    the last `persistence` steps. The first step of a block is compared with the last step of the
    block before.

    Source: CORA-Diff, arXiv 2608.11235, defaults 0.65 and 1 (calibrated on GSM8K). The authors'
    code keeps the last prediction of the whole canvas. So does this policy if the engine has the
    logits of later blocks (transformers, bidirectional models, cache "none" or "prefix"); elsewhere
    a block's first step has no previous step to compare with, and its tokens are unmasked one step
    later. The authors' end-of-text truncation is done by the engine here (`end_of_text`).
    """

    requires = frozenset({"ahead"})
    row_options = frozenset({"threshold", "persistence"})

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.65
    persistence: Annotated[int, Field(ge=0), UpTo("block")] = 1

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        shape = (batch_size, block_length)
        return {
            "x0": torch.full(shape, -1, dtype=torch.int64, device=device),
            "stood": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        before = torch.where(step.step_index.unsqueeze(-1) > 0, state["stood"], 0)
        stood = torch.where(step.x0 == state["x0"], before + 1, 0)
        state.update(x0=step.x0, stood=stood)
        return step.masked & (step.confidence >= self.threshold) & (stood >= self.persistence)
