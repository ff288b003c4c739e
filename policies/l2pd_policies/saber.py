"""Saber: adaptive acceleration, and backtracking."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import UpTo, policy_options
from l2pd_plugins.policy import DenoisingStep, RemaskingPolicy
from l2pd_plugins.selection import top_k


@policy_options
class Saber(RemaskingPolicy):
    """Unmask above the mean confidence of committed tokens; remask the tokens that have lost most.

    The threshold is the mean of the confidences with which the answer's tokens were last committed,
    and 1 before the first commit. At least the `n` most confident positions are drafted. If |D|
    tokens are drafted, max(floor(`n` / 2), ceil(|D| / `mu`)) committed tokens (drafted ones
    included) are masked again, but fewer than |D|: those at which the probability of the likeliest
    token fell most since the step before. The first step of a later block has no step before it and
    remasks nothing.

    Source: Saber, arXiv 2510.18165; the rule and the defaults 2 and 8 are those of the authors'
    code (`generate_with_saber`), which decodes an answer as one block. With several blocks that
    code may remask tokens of earlier blocks; here a full block is final. If fewer than `n` masks
    are left, that code overwrites a committed token; here it does not. The paper has the same
    threshold as the code, but remasks max(1, floor(|D| / mu)) tokens.
    """

    requires = frozenset({"committed"})
    carries = frozenset({"total", "count"})
    row_options = frozenset({"n", "mu"})

    n: Annotated[int, Field(ge=1), UpTo("block")] = 2
    mu: Annotated[int, Field(ge=1), UpTo("block")] = 8

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        shape = (batch_size, block_length)
        return {
            # Sum of the confidences of all committed positions, in all blocks so far, and their
            # number. A position counts once, with its last commit.
            "total": torch.zeros(batch_size, dtype=torch.float64, device=device),
            "count": torch.zeros(batch_size, dtype=torch.int64, device=device),
            # NaN: not committed yet.
            "at_commit": torch.full(shape, torch.nan, device=device),
            "open": torch.zeros(shape, dtype=torch.bool, device=device),
            "likeliest": torch.zeros(shape, device=device),
        }

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        count = state["count"]
        mean = torch.where(count > 0, state["total"] / count.clamp(min=1), 1.0)
        beats = step.masked & (step.confidence > mean.unsqueeze(-1))
        state["open"] = step.masked
        return beats | top_k(step.confidence, step.masked, self.n)

    def remask(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        drafted = state["open"] & ~step.masked
        confidence = step.confidence.nan_to_num()
        first_time = drafted & state["at_commit"].isnan()
        gained = confidence.double() - state["at_commit"].nan_to_num().double()
        risen = confidence - state["likeliest"]
        state.update(
            total=state["total"] + torch.where(drafted, gained, 0).sum(-1),
            count=state["count"] + first_time.sum(-1),
            at_commit=torch.where(drafted, confidence, state["at_commit"]),
            likeliest=confidence,
        )
        size = drafted.sum(-1, keepdim=True)
        back = ((size + self.mu - 1) // self.mu).clamp(min=self.n // 2)
        back = torch.minimum(back, size - 1)
        known = (step.step_index > 0) | (step.block_index == 0)
        back = torch.where(known.unsqueeze(-1) & step.masked.any(-1, keepdim=True), back, 0)
        return top_k(-risen, ~step.masked & step.present, back)
