"""CreditDecoding: predictions earn credit by being made again."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_policies.readings import probability_of


@options
class Credit(UnmaskPolicy):
    """Unmask what is confident once the credit of earlier steps is added to the logits.

    Every step, all credits decay by `beta` and the predicted token earns p^`gamma`; the logit of a
    token with credit C rises by `alpha` log(1 + C). A position is taken if its prediction is still
    the likeliest token then, with at least `threshold`.

    Source: CreditDecoding, arXiv 2510.06133, with dInfer's defaults (alpha 0.7, beta 0.8, gamma
    0.2). There a token with more credit can replace the prediction; a policy chooses positions, so
    here such a position waits until the model predicts it. The credit is kept for the tokens that
    have any, not (B, L, V).
    """

    requires = frozenset({"confidence", "logits"})

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    alpha: Annotated[float, Field(ge=0)] = 0.7
    beta: Annotated[float, Field(ge=0, le=1)] = 0.8
    gamma: Annotated[float, Field(ge=0)] = 0.2

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        # A step brings at most one new token, and a block takes at most as many steps as it is long
        shape = (batch_size, block_length, block_length)
        return {
            "tokens": torch.full(shape, -1, dtype=torch.int64, device=device),
            "credit": torch.zeros(shape, device=device),
        }

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        x0 = step.x0.unsqueeze(-1)
        known = state["tokens"] == x0
        free = torch.arange(known.shape[-1], device=x0.device) == step.step_index.view(-1, 1, 1)
        slot = torch.where(known.any(-1, keepdim=True), known, free)
        tokens = torch.where(slot, x0, state["tokens"])
        earned = slot * step.confidence.unsqueeze(-1) ** self.gamma
        credit = self.beta * state["credit"] + earned
        state.update(tokens=tokens, credit=credit)

        p = probability_of(step, tokens)
        raised = p * (1 + credit) ** self.alpha
        whole = 1 + (raised - p).sum(-1)
        of_x0 = torch.where(slot, raised, 0).sum(-1)
        likeliest = of_x0 >= raised.amax(-1)
        return step.masked & likeliest & (of_x0 / whole >= self.threshold)
