"""The filter of the paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l2pd_plugins.trajectories import Trajectories
from l2pd_policies.learned.filter import LearnedFilter


class UnmaskFilter(LearnedFilter, tags=["learn2pd"], paper_url="https://arxiv.org/abs/2509.25188"):
    """Linear(L, L), ReLU, Linear(L, L) on the confidences of a block's L positions.

    Source: Learn2PD, arXiv 2509.25188: 2,112 parameters at L = 32. The arguments are those of
    `LearnedFilter`. The filter fits one block length.
    """

    POLICY = "learn2pd"
    FEATURES = ("confidence",)
    COMPARED = FEATURES

    def __init__(self, block_length: int = 32, **config: Any) -> None:
        super().__init__(block_length=block_length, **config)
        self.fc1 = nn.Linear(block_length, block_length)
        self.fc2 = nn.Linear(block_length, block_length)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, L) float32 confidences, 0 at positions that are not present -> (B, L) logits."""
        return self.layer(self.fc2, torch.relu(self.layer(self.fc1, inputs)))

    @staticmethod
    def inputs_of(trajectories: Trajectories) -> Tensor:
        """(N, L): the confidences that the policy would pass to the filter at every recorded
        step.
        """
        return trajectories.confidence
