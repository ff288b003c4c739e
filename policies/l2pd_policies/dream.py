"""Dream's orders, by margin and by entropy, with its schedule."""

from __future__ import annotations

import torch
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep
from l2pd_policies.fixed_schedule import FixedSchedule

_LAST_TIME = 1e-3
"""Final time of Dream's schedule, `eps` in its code."""


class _DreamSchedule(FixedSchedule):
    def share(self, step: DenoisingStep, masks: Tensor, steps: Tensor) -> Tensor:
        left = step.masked.sum(-1)
        # float64, since the floor is sensitive to rounding; these are only (B,) numbers.
        index = step.step_index.double()
        time, following = (1 - (1 - _LAST_TIME) * at / steps for at in (index, index + 1))
        share = (left * (1 - following / time)).floor().long()
        return torch.where(step.step_index < steps - 1, share, left)


@policy_options
class DreamMargin(_DreamSchedule):
    """Unmask the positions of the largest margin, as many as Dream's schedule says.

    The margin is p(top1) - p(top2). With m masks left, a step from time s to s' unmasks
    floor(m (1 - s' / s)) positions, with times evenly spaced from 1 to 0.001, and all remaining
    ones at the last step. `steps` counts the steps of the whole canvas; `tokens_per_step` fixes the
    number per step instead (1 by default).

    Source: Dream, arXiv 2508.15487, `alg="topk_margin"` of its code with alg_temp 0. In that code a
    step whose share is 0 commits nothing; here it commits the most confident position.
    """

    requires = frozenset({"margin"})

    def score(self, step: DenoisingStep) -> Tensor:
        return step.margin


@policy_options
class DreamEntropy(_DreamSchedule):
    """Unmask the positions of the lowest entropy, as many as Dream's schedule says.

    The schedule is that of `dream_margin`.

    Source: Dream, arXiv 2508.15487, `alg="entropy"` of its code with alg_temp 0.
    """

    requires = frozenset({"entropy"})

    def score(self, step: DenoisingStep) -> Tensor:
        return -step.entropy
