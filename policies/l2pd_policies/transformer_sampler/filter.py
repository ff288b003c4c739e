"""One transformer layer with adaptive layer norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2pd_plugins.trajectories import Trajectories
from l2pd_policies import exact
from l2pd_policies.learned.filter import LearnedFilter

WIDTH = 32
HEADS = 2
TIMES = 8
"""Number of sines (and of cosines) in the embedding of time."""


class SamplerFilter(
    LearnedFilter, tags=["transformer_sampler"], paper_url="https://arxiv.org/abs/2512.09106"
):
    """Maps confidence, mask and time of a block's positions to a score for each position.

    Layers: Linear(2 -> 32); self-attention with 2 heads, and an MLP of Linear(32 -> 64), GELU,
    Linear(64 -> 32), each after a layer norm and before a gate, with scale, shift and gate computed
    from time (adaptive layer norm, as in DiT); a final layer norm of this kind, and Linear(32 ->
    1). There is no position embedding, so the same weights fit every block length.

    Source: arXiv 2512.09106 for the inputs, the single layer and its conditioning on time; the
    widths and the embedding of time are this project's.
    """

    POLICY = "transformer_sampler"
    FEATURES = ("confidence", "masked", "present", "time")
    ANY_BLOCK_LENGTH = True

    def __init__(self, block_length: int | None = None, **config: Any) -> None:
        super().__init__(block_length=block_length, **config)
        self.embed = nn.Linear(2, WIDTH)
        self.time = nn.Linear(2 * TIMES, WIDTH)
        self.modulation = nn.Linear(WIDTH, 8 * WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, L, 4) features -> (B, L) logits."""
        # The exact functions have no gradient, and training does not need bit-equality.
        silu, gelu = (F.silu, F.gelu) if self.training else (exact.silu, exact.gelu)
        present, time = inputs[..., 2] > 0, inputs[:, :1, 3]
        x = self.layer(self.embed, inputs[..., :2])
        conditioned = silu(self.layer(self.time, _waves(time)))
        m = self.layer(self.modulation, conditioned).unsqueeze(1).chunk(8, dim=-1)
        x = x + m[2] * self._attention(_norm(x, m[0], m[1]), present)
        hidden = gelu(self.layer(self.up, _norm(x, m[3], m[4])))
        x = x + m[5] * self.layer(self.down, hidden)
        return self.layer(self.out, _norm(x, m[6], m[7])).squeeze(-1)

    def _attention(self, x: Tensor, present: Tensor) -> Tensor:
        """Attention of every position to all present positions: (B, L, D) -> (B, L, D).

        Uses products and sums instead of matrix products, as `layer` does: a row's bits must not
        depend on its batch.
        """
        rows, length, _ = x.shape
        heads = self.layer(self.qkv, x).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads  # (B, H, L, D / H) each
        scores = (queries.unsqueeze(-2) * keys.unsqueeze(-3)).sum(-1) / math.sqrt(keys.shape[-1])
        # Not -inf: a block without any present position has to stay finite.
        weights = scores.masked_fill(~present[:, None, None], -1e9).softmax(-1)
        mixed = (weights.unsqueeze(-2) * values.transpose(-1, -2).unsqueeze(-3)).sum(-1)
        return self.layer(self.mix, mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def inputs_of(trajectories: Trajectories) -> Tensor:
        """(N, L, 4): the features that the policy would pass to the filter at every recorded
        step.
        """
        t = trajectories
        return features(t.confidence, t.masked, t.present, t.step)


def features(confidence: Tensor, masked: Tensor, present: Tensor, step_index: Tensor) -> Tensor:
    """(B, L) each and step_index (B,) -> (B, L, 4) float32.

    Time is the number of steps taken in the block divided by its positions: from 0 to below 1.
    """
    time = step_index / present.sum(-1).clamp(min=1)
    channels = [
        confidence.nan_to_num(),
        masked.float(),
        present.float(),
        time.unsqueeze(-1).expand_as(confidence),
    ]
    return torch.stack(channels, dim=-1)


def _norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,)) * (1 + scale) + shift


def _waves(time: Tensor) -> Tensor:
    """(B, 1) -> (B, 2 * TIMES): sines and cosines of 2^0 to 2^(TIMES - 1) half turns."""
    angles = time * (math.pi * 2.0 ** torch.arange(TIMES, device=time.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
