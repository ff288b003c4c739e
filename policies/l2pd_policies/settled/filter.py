"""A small convolutional filter, independent of the block length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2pd_plugins.trajectories import Trajectories
from l2pd_policies.learned.filter import LearnedFilter
from l2pd_policies.settled.signals import SIGNALS, how_long, signals

WIDTH = 48
KERNEL = 5


class SignalFilter(LearnedFilter, tags=["settled"]):
    """Two convolutions over the positions of a block, with the block's mean between them.

    Conv(C -> 48, 5), ReLU, + Linear(mean over the block), Conv(48 -> 48, 5), ReLU, Linear(48 -> 1).
    Positions outside the block count as not present, so the same weights fit every block length.
    """

    POLICY = "settled"
    FEATURES = SIGNALS
    ANY_BLOCK_LENGTH = True
    COMPARED = (
        "confidence",
        "log_doubt",
        "margin",
        "entropy",
        "outdone",
        "echoes",
        "like_left",
        "like_second_left",
        "surer",
        "surer_doubt",
    )

    def __init__(self, block_length: int | None = None, **config: Any) -> None:
        super().__init__(block_length=block_length, **config)
        self.conv1 = nn.Linear(len(SIGNALS) * KERNEL, WIDTH)
        self.pooled = nn.Linear(WIDTH, WIDTH)
        self.conv2 = nn.Linear(WIDTH * KERNEL, WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, L, C) signals -> (B, L) logits."""
        present = inputs[..., 1:2]
        hidden = torch.relu(self.layer(self.conv1, _windows(inputs))) * present
        mean = hidden.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
        hidden = torch.relu(hidden + self.layer(self.pooled, mean)) * present
        hidden = torch.relu(self.layer(self.conv2, _windows(hidden)))
        return self.layer(self.out, hidden).squeeze(-1)

    @staticmethod
    def inputs_of(trajectories: Trajectories) -> Tensor:
        """(N, L, C): the signals of every recorded step, equal to those of `Settled.inputs`."""
        t = trajectories
        key = torch.stack([t.policy, t.prompt, t.block, t.step])
        order = torch.arange(len(t))
        for name in reversed(range(4)):
            order = order[key[name][order].argsort(stable=True)]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(t)))
        t = t.take(order)
        first = t.step == 0
        before = torch.where(first.unsqueeze(-1), 0.0, t.confidence.roll(1, 0))
        x0_before = t.x0.roll(1, 0)
        stood = torch.zeros_like(t.x0, dtype=torch.int64)
        # Step by step, since `stood` depends on the step before.
        for index in range(int(t.step.max()) + 1):
            at = (t.step == index).nonzero().flatten()
            stood[at] = how_long(t.x0[at], x0_before[at], stood[at - 1], first[at])
        known = {
            "masked": t.masked,
            "present": t.present,
            "confidence": t.confidence,
            "confidence_before": before,
            "stood": stood,
            "margin": t.margin,
            "entropy": t.entropy,
            "x0": t.x0,
            "step_index": t.step,
        }
        made = [  # in parts, since signals compare all pairs of positions
            signals(**{name: value[part] for name, value in known.items()})
            for part in torch.arange(len(t)).split(4096)
        ]
        return torch.cat(made)[back]


def _windows(x: Tensor) -> Tensor:
    """(B, L, C) -> (B, L, C * KERNEL): each position with its neighbours, zeros outside the
    block.
    """
    reach = KERNEL // 2
    padded = F.pad(x, (0, 0, reach, reach))
    return torch.cat([padded[:, i : i + x.shape[1]] for i in range(KERNEL)], dim=-1)
