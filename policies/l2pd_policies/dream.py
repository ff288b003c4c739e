"""Dream's orders, by confidence, margin and entropy, with its schedule."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep
from l2pd_policies.draws import exponential
from l2pd_policies.fixed_schedule import FixedSchedule

_LAST_TIME = 1e-3
"""Final time of Dream's schedule, `eps` in its code."""


@policy_options
class _Dream(FixedSchedule):
    row_options = frozenset({"steps", "tokens_per_step", "alg_temp"})

    alg_temp: Annotated[float, Field(ge=1e-4, le=1000)] | None = None

    def certainty(self, step: DenoisingStep) -> Tensor:
        """(B, L): what orders the positions, or the logits of drawing them."""
        raise NotImplementedError

    def score(self, step: DenoisingStep) -> Tensor:
        certainty = self.certainty(step)
        if self.alg_temp is None:
            return certainty
        # The largest p / q with q drawn from the exponential distribution are a draw without
        # replacement with the probabilities p: so torch.multinomial draws, too. A division by a
        # tensor gives the same bits whether each row has its own temperature or not.
        temperature = torch.ones_like(certainty[:, :1]) * self.alg_temp
        draws = exponential(step, self.name, ", or leave alg_temp out")
        return certainty / temperature - draws.log()

    def share(self, step: DenoisingStep, masks: Tensor, steps: Tensor) -> Tensor:
        left = step.masked.sum(-1)
        # float64, since the floor is sensitive to rounding; these are only (B,) numbers.
        index = step.step_index.double()
        time, following = (1 - (1 - _LAST_TIME) * at / steps for at in (index, index + 1))
        share = (left * (1 - following / time)).floor().long()
        return torch.where(step.step_index < steps - 1, share, left)


@policy_options
class DreamConfidence(_Dream):
    """Unmask the positions of the highest confidence, as many as Dream's schedule says.

    The schedule and `alg_temp` are those of `dream_margin`.

    Source: Dream, arXiv 2508.15487, `alg="maskgit_plus"` of its code.
    """

    def certainty(self, step: DenoisingStep) -> Tensor:
        return step.confidence


@policy_options
class DreamMargin(_Dream):
    """Unmask the positions of the largest margin, as many as Dream's schedule says.

    The margin is p(top1) - p(top2). With m masks left, a step from time s to s' unmasks
    floor(m (1 - s' / s)) positions, with times evenly spaced from 1 to 0.001, and all remaining
    ones at the last step. `steps` counts the steps of the whole canvas; `tokens_per_step` fixes the
    number per step instead (1 by default). With `alg_temp`, that many positions are drawn without
    replacement instead, with probabilities proportional to exp(margin / alg_temp); this needs a
    seed, and raises an L2PDError without one.

    Source: Dream, arXiv 2508.15487, `alg="topk_margin"` of its code. In that code a step whose
    share is 0 commits nothing; here it commits the most confident position.
    """

    requires = frozenset({"margin"})

    def certainty(self, step: DenoisingStep) -> Tensor:
        return step.margin


@policy_options
class DreamEntropy(_Dream):
    """Unmask the positions of the lowest entropy, as many as Dream's schedule says.

    The schedule and `alg_temp` are those of `dream_margin`.

    Source: Dream, arXiv 2508.15487, `alg="entropy"` of its code.
    """

    requires = frozenset({"entropy"})

    def certainty(self, step: DenoisingStep) -> Tensor:
        return -step.entropy
