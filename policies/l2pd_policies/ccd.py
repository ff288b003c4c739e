"""CCD: predictions on which two consecutive steps agree."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import UpTo, policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_plugins.selection import top_k


@policy_options
class CCD(UnmaskPolicy):
    """Unmask the positions that two consecutive steps rank high with the same prediction.

    Each step remembers the `candidates` most confident masked positions. A position that the step
    before also remembered, with the same prediction, is committed.

    Source: Coherent Contextual Decoding, arXiv 2512.02044. The paper's history buffer weighs tokens
    by mutual information; this is the rule for a history of two steps. The default 4 was chosen by
    this project. The authors' code has no blocks and ranks the whole canvas; here a block's first
    step has no previous step to agree with.
    """

    counts_commits = True
    row_options = frozenset({"candidates"})

    candidates: Annotated[int, Field(ge=1), UpTo("block")] = 4

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        shape = (batch_size, block_length)
        return {"x0": torch.full(shape, -1, dtype=torch.int64, device=device)}

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        kept = top_k(step.confidence, step.masked, self.candidates)
        agreed = kept & (step.x0 == state["x0"])
        state["x0"] = torch.where(kept, step.x0, -1)
        return agreed
