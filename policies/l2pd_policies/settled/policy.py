"""The policy around the signal filter."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep
from l2pd_policies import exact
from l2pd_policies.learned.fallback import FallbackPolicy
from l2pd_policies.settled.filter import SignalFilter
from l2pd_policies.settled.signals import how_long, signals

DOUBT_POWER = 0.7
"""Exponent of the doubts (1 - probability) in the sum that `risk` bounds. With 1, the sum bounds
the probability that any of the predictions is wrong, if the filter's probabilities are calibrated.
The filter is least calibrated for small doubts; a power below 1 gives these more weight.
It was chosen on prompts that are not shipped (benchmarks/trials.md).
"""


@policy_options
class Settled(FallbackPolicy):
    """Unmask the predictions that a small convolutional filter considers settled.

    The filter has more inputs than the paper's: masks, margin, entropy, the confidence one step
    before, for how many steps the prediction has been the same, which positions predict the same
    token, and what would be committed together with it, each for the position and its neighbours.
    It fits any block length, and it is trained on the states that its own decisions reach.

    `filter` is a folder or hub id; the default is the filter in the model's folder. `threshold` is
    the probability above which a prediction is always accepted; the default is the filter's
    calibrated threshold. Below it, the most probable predictions are accepted as long as the sum of
    (1 - probability)^0.7 is at most `risk`^0.7. With `risk` 0 only the threshold decides.

    Use a filter on prompts like those it was trained on. On other kinds of text the filter alone
    ruins answers: trained without three tasks of tiny-llada's world, it has 72 % valid answers on
    these at a risk of 0.03, while one token per step has 98 % (docs/learned_policies.md). So a
    block that looks unlike all blocks of the training, before anything is committed in it, is
    decided by the rule of `eb_sampler` with `fallback_gamma` (0.02), which needs no training, and
    so is the rest of the answer. With ``fallback="confidence_threshold"`` it is decided by the
    plain threshold `fallback_threshold` (0.9), with "none" by the filter.

    Source: this project; the setting is that of Learn2PD, arXiv 2509.25188, persistence is the
    signal of CORA-Diff, arXiv 2608.11235.
    """

    requires = frozenset({"committed", "margin", "entropy"})
    filter_class = SignalFilter
    folder_name = "settled"
    row_options = FallbackPolicy.row_options | {"risk", "bound"}

    risk: Annotated[float, Field(ge=0, lt=1)] = 0.1
    fallback: Literal["eb_sampler", "confidence_threshold", "none"] = "eb_sampler"

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        shape = (batch_size, block_length)
        return super().init_state(batch_size, block_length, device) | {
            "x0": torch.full(shape, -1, dtype=torch.int64, device=device),
            "confidence": torch.zeros(shape, device=device),
            "stood": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def accepts(self, probability: Tensor, masked: Tensor) -> Tensor:
        """Positions above the threshold, and those with the least doubt within the risk."""
        return super().accepts(probability, masked) | _within(self.bound, 1 - probability, masked)

    @cached_property
    def bound(self) -> float:
        """What the sum of the weighed doubts may be; computed in float64."""
        return self.risk**DOUBT_POWER

    def inputs(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """(B, L, C) float32 signals; stores in the state what the next step compares with."""
        stood = how_long(step.x0, state["x0"], state["stood"], step.step_index == 0)
        made = signals(
            masked=step.masked,
            present=step.present,
            confidence=step.confidence,
            confidence_before=state["confidence"],
            stood=stood,
            margin=step.margin,
            entropy=step.entropy,
            x0=step.x0,
            step_index=step.step_index,
        )
        state.update(x0=step.x0, confidence=step.confidence, stood=stood)
        return made


def _within(bound: float, doubt: Tensor, masked: Tensor) -> Tensor:
    """bool (B, L): the masked positions of least doubt whose doubts, each raised to `DOUBT_POWER`,
    sum to at most `bound`.
    """
    weighed = exact.power(doubt, DOUBT_POWER)
    ordered, places = torch.where(masked, weighed, torch.inf).sort(stable=True, dim=-1)
    return torch.zeros_like(masked).scatter(-1, places, ordered.cumsum(-1) <= bound)
