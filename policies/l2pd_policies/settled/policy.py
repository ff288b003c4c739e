"""The policy around the signal filter."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep
from l2pd_policies import exact
from l2pd_policies.learned.policy import FilterPolicy
from l2pd_policies.settled.filter import SignalFilter
from l2pd_policies.settled.signals import how_long, signals

DOUBT_POWER = 0.7
"""With 1, the sum bounds the probability that any of the predictions is wrong, if the filter's
probabilities are right. It errs most where it is surest, so small doubts count for more; the power
was chosen on prompts beside the shipped ones (benchmarks/trials.md)."""


@policy_options
class Settled(FilterPolicy):
    """Unmask the predictions that a small convolutional filter takes for settled.

    It sees more than the paper's filter: masks, margin, entropy, the confidence one step before,
    for how many steps the prediction has stood, which positions predict the same token, and what
    would be committed with it, each with the position's neighbours. It fits any block length, and
    it is trained on the states that its own decisions reach.

    `filter` is a folder or hub id; without it, the filter that belongs to the model. `threshold`
    is the probability above which a prediction is always taken; without it, the one the filter
    was calibrated for. Below it the surest are taken, as long as their doubts (1 - probability)
    sum to at most `risk`, each raised to the power 0.7 as `risk` is: a small doubt is larger than
    it looks. 0 leaves the threshold alone to decide.

    Use a filter on prompts like those it was trained on. On other kinds of text it can ruin
    answers without a warning: trained without three tasks of tiny-llada's world, it has 72 % valid
    answers on them at a risk of 0.03, where one token per step has 98 %
    (docs/learned_policies.md).

    Source: this project; the setting is that of Learn2PD, arXiv 2509.25188, persistence is the
    signal of CORA-Diff, arXiv 2608.11235.
    """

    requires = frozenset({"committed", "margin", "entropy"})
    filter_class = SignalFilter
    folder_name = "settled"

    risk: Annotated[float, Field(ge=0, lt=1)] = 0.1

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
        """What exceeds the threshold, and the surest within the risk."""
        return super().accepts(probability, masked) | _within(self.risk, 1 - probability, masked)

    def inputs(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        """(B, L, C) signals; what the next step compares with goes into the state."""
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


def _within(risk: float, doubt: Tensor, masked: Tensor) -> Tensor:
    """bool (B, L): the masked positions of least doubt, as many as sum to `risk` at most, with
    doubts and `risk` to `DOUBT_POWER`."""
    weighed = exact.power(doubt, DOUBT_POWER)
    ordered, places = torch.where(masked, weighed, torch.inf).sort(stable=True, dim=-1)
    return torch.zeros_like(masked).scatter(-1, places, ordered.cumsum(-1) <= risk**DOUBT_POWER)
