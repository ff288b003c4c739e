"""A filter on the confidences of a block that is monotone in a position's own confidence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2pd_plugins.trajectories import Trajectories
from l2pd_policies import exact
from l2pd_policies.learned.filter import LearnedFilter

ODDS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Log odds of a confidence at which the filter's slope may change."""
DOUBTS = (-4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5)
"""The same for log10 of the summed doubts of surer positions."""
REACH, HIDDEN, UNITS = 2, 16, 16
MOST = 3.0
"""Bound of what the rest of the block can add to a unit, or take from it, whatever the position's
own confidence."""


class MonotoneFilter(LearnedFilter, tags=["learn2pd"]):
    """A logit that never falls if a position's own confidence rises, the others' being fixed.

    Two sums go through a layer of units with weights of at least 0: a piecewise linear function of
    the own log odds, and minus one of the summed doubts (1 - confidence) of the more confident
    masked positions, which would be committed together with this one. The rest of the block (how
    many masked positions have which confidence, and the neighbours) shifts each unit, in bounds.
    """

    POLICY = "learn2pd,variant=monotone"
    FEATURES = ("confidence", "masked")
    ANY_BLOCK_LENGTH = True
    COMPARED = ("confidence",)

    def __init__(self, block_length: int | None = None, **config: Any) -> None:
        super().__init__(block_length=block_length, **config)
        self.own = nn.Parameter(torch.full((UNITS, len(ODDS)), -3.0))
        self.surer = nn.Parameter(torch.full((UNITS, len(DOUBTS) + 1), -3.0))
        self.hidden = nn.Linear(len(ODDS) + 4 * REACH + 2, HIDDEN)
        self.shift = nn.Linear(HIDDEN, UNITS)
        self.offset = nn.Parameter(torch.linspace(-2, 2, UNITS))
        self.out = nn.Parameter(torch.full((UNITS,), -1.0))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, L, 2): confidences, and 1 where masked -> (B, L) logits."""
        confidence, masked = inputs.unbind(-1)
        odds = confidence.clamp(min=1e-6).log() - (1 - confidence).clamp(min=1e-6).log()
        open_too = masked.unsqueeze(-1) * masked.unsqueeze(-2)
        surer = open_too * (confidence.unsqueeze(-2) > confidence.unsqueeze(-1))
        doubt = (surer * (1 - confidence).unsqueeze(-2)).sum(-1)
        own = _above(odds, ODDS)
        less = -torch.cat(
            (
                _above((doubt + 1e-4).log10(), DOUBTS),
                surer.sum(-1, keepdim=True) / 16,
            ),
            dim=-1,
        )
        known = torch.relu(self.layer(self.hidden, self._rest(odds, masked)))
        shift = MOST * (2 * exact.sigmoid(self.layer(self.shift, known)) - 1)
        x = self._positive(own, self.own) + self._positive(less, self.surer) + self.offset + shift
        # Half of the units are convex, half concave.
        convex, concave = x.chunk(2, dim=-1)
        units = torch.cat((torch.relu(convex), -torch.relu(-concave)), dim=-1)
        return (units * F.softplus(self.out)).sum(-1) + self.bias

    def _rest(self, odds: Tensor, masked: Tensor) -> Tensor:
        """(B, L, C): about the other positions of the block alone."""
        reached = (odds.unsqueeze(-1) - odds.new_tensor(ODDS) + 0.5).clamp(0, 1)
        reached = reached * masked.unsqueeze(-1)
        others = (reached.sum(1, keepdim=True) - reached).clamp(min=0)
        open_ = (masked.sum(-1, keepdim=True) - masked).unsqueeze(-1)
        both = torch.stack((odds.clamp(-8, 8) / 8, masked), dim=-1)
        padded = F.pad(both, (0, 0, REACH, REACH))
        length = odds.shape[1]
        beside = [padded[:, i : i + length] for i in range(2 * REACH + 1) if i != REACH]
        return torch.cat((others / (1 + others), *beside, open_ / (1 + open_), open_ / 32), dim=-1)

    def _positive(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., I) with weights (O, I), made positive -> (..., O); in eval mode whatever the batch,
        as `layer`.
        """
        made = F.softplus(weight)
        return F.linear(x, made) if self.training else (x.unsqueeze(-2) * made).sum(-1)

    @staticmethod
    def inputs_of(trajectories: Trajectories) -> Tensor:
        """(N, L, 2): what the policy would pass to the filter at every recorded step."""
        return torch.stack((trajectories.confidence, trajectories.masked.float()), dim=-1)


def _above(x: Tensor, knots: tuple[float, ...]) -> Tensor:
    """(..., K): by how much x exceeds each knot."""
    return (x.unsqueeze(-1) - x.new_tensor(knots)).clamp(min=0)
