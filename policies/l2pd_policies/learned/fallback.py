"""Blocks unlike a filter's training are decided by a rule that needs no training."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from l2pd_plugins.once import Once
from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, ModelContext
from l2pd_policies.confidence_threshold import ConfidenceThreshold
from l2pd_policies.eb_sampler import entropy_bounded
from l2pd_policies.learned.familiar import FILE
from l2pd_policies.learned.filter import LearnedFilter
from l2pd_policies.learned.policy import FilterPolicy

FALLBACK_GAMMA = 0.02
"""Default of the option `fallback_gamma`, in nats. It is less than that of `eb_sampler`: with 0.05
and 0.1 the weaker small model loses validity against the threshold (benchmarks/trials.md)."""

logger = logging.getLogger(__name__)
_first = Once()


@policy_options
class FallbackPolicy(FilterPolicy):
    """A filter that decides only about blocks like those of its training.

    Unless `fallback` is "none", a block is compared with those of the training before anything is
    committed in it (`Familiar`). If it is unlike all of them, the rule named by `fallback` decides
    in this block and in the later blocks of the same answer, and the filter decides nothing there:
    some later blocks of an unlike text are like those of the training. "eb_sampler" bounds the
    entropies of what is unmasked by `fallback_gamma` nats (default 0.02); "confidence_threshold"
    unmasks every position with at least `fallback_threshold` confidence (default: that of the
    policy of this name).
    """

    row_options = FilterPolicy.row_options | {"fallback_threshold", "fallback_gamma"}

    fallback: Literal["eb_sampler", "confidence_threshold", "none"] = "none"
    fallback_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    fallback_gamma: Annotated[float, Field(ge=0)] | None = None

    def __post_init__(self) -> None:
        if self.fallback == "confidence_threshold" and self.fallback_threshold is None:
            self.fallback_threshold = ConfidenceThreshold.threshold
        if self.fallback == "eb_sampler":
            if self.fallback_gamma is None:
                self.fallback_gamma = FALLBACK_GAMMA
            # A class variable in other policies; here only this rule needs the entropy.
            vars(self)["requires"] = self.requires | {"entropy"}
        super().__post_init__()

    def _use(self, loaded: LearnedFilter, on_device: dict[torch.device, LearnedFilter]) -> None:
        super()._use(loaded, on_device)
        self._compares = self.fallback != "none" and loaded.familiar is not None
        # A class variable in other policies; here a policy without a fallback has no such state.
        vars(self)["carries"] = frozenset({"fallback"} if self._compares else ())

    def for_model(self, model: ModelContext) -> Self:
        ready = super().for_model(model)
        if ready.fallback != "none" and not ready._compares:
            message = (
                f"{self.name}: the filter {ready.filter} does not say what blocks looked like in "
                f"its training (it has no {FILE}), so there is nothing to compare with: the "
                "filter decides everything; `l2pd learn2pd familiar` makes the file"
            )
            if _first(message):
                logger.warning(message)
        return ready

    def init_state(
        self, batch_size: int, block_length: int, device: torch.device
    ) -> dict[str, Tensor]:
        state = super().init_state(batch_size, block_length, device)
        if self._compares:
            state["fallback"] = torch.zeros(batch_size, dtype=torch.bool, device=device)
        return state

    def scores(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        decider = self._filter_on(step.confidence.device)
        inputs = self.inputs(step, state)
        if "fallback" in state:
            state["fallback"] = _unlike(decider, inputs, step, state["fallback"])
        scores: Tensor = decider(inputs)
        return scores

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        own = super().select(step, state)
        if "fallback" not in state:
            return own
        return torch.where(state["fallback"].unsqueeze(-1), self._untrained(step), own)

    def _untrained(self, step: DenoisingStep) -> Tensor:
        """bool (B, L): what the rule of the option `fallback` unmasks."""
        if self.fallback == "eb_sampler":
            assert self.fallback_gamma is not None  # set with the option `fallback`
            return entropy_bounded(step.entropy, step.masked, self.fallback_gamma)
        assert self.fallback_threshold is not None
        return step.masked & (step.confidence >= self.fallback_threshold)


def _unlike(decider: LearnedFilter, inputs: Tensor, step: DenoisingStep, before: Tensor) -> Tensor:
    """(B,) bool: rows whose blocks, this one or an earlier one, are unlike the training. A block is
    compared at its first step.
    """
    first = step.step_index == 0
    if first.device.type == "cpu" and not first.any():
        return before
    assert decider.familiar is not None  # the state says so
    now = decider.familiar.unlike(decider.described(inputs, step.masked))
    return before | (first & now)
