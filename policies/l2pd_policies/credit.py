"""CreditDecoding: repeated predictions gain credit."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_policies import exact
from l2pd_policies.logit_reads import probability_of

_TIE = 1e-5
"""If no position reaches the threshold, those within this distance of the best are unmasked."""


@policy_options
class Credit(UnmaskPolicy):
    """Unmask positions that are confident after the credit of earlier steps is added to the logits.

    Every step, all credits decay by `beta` and the predicted token earns p^`gamma`; the logit of a
    token with credit C rises by `alpha` log(1 + C). A position is unmasked if its prediction is
    then still the likeliest token and has a probability of at least `threshold`. If there is none,
    the likeliest such prediction is unmasked, and those within 1e-5 of it.

    Source: CreditDecoding, arXiv 2510.06133, with dInfer's rule and defaults (alpha 0.7, beta 0.8,
    gamma 0.2). In dInfer a token with more credit can replace the prediction. A policy only chooses
    positions, so here such a position waits until the model itself predicts that token; if all
    positions wait, the most confident one is unmasked. Credit is stored only for tokens that have
    any, not as (B, L, V). As in dInfer, it begins with the block.
    """

    requires = frozenset({"logits"})
    # Not alpha and gamma, which are exponents in float64, nor beta, which goes with them.
    row_options = frozenset({"threshold"})

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
        fused = self.fused(step, state)
        limit = (fused.amax(-1, keepdim=True) - _TIE).clamp(max=self.threshold)
        return fused.isfinite() & (fused >= limit)

    def fused(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """(B, L): the probability of each masked position's prediction with its credit; -inf where
        another token is likelier. The credit of this step goes into the state."""
        x0 = step.x0.unsqueeze(-1)
        known = state["tokens"] == x0
        free = torch.arange(known.shape[-1], device=x0.device) == step.step_index.view(-1, 1, 1)
        slot = torch.where(known.any(-1, keepdim=True), known, free)
        tokens = torch.where(slot, x0, state["tokens"])
        earned = slot * exact.power(step.confidence, self.gamma).unsqueeze(-1)
        credit = self.beta * state["credit"] + earned
        state.update(tokens=tokens, credit=credit)

        p = probability_of(step, tokens)
        raised = p * exact.power(1 + credit, self.alpha)
        whole = 1 + (raised - p).sum(-1)
        of_x0 = torch.where(slot, raised, 0).sum(-1)
        fused = of_x0 / whole
        ready = step.masked & (of_x0 >= raised.amax(-1)) & ~fused.isnan()
        return torch.where(ready, fused, -torch.inf)
