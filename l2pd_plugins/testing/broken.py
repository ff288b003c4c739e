"""Policies that break the contract, each in one way, to see that the kit catches it.

`CAUGHT_BY` names the check that is meant for each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy

State = dict[str, Tensor]


class Stuck(UnmaskPolicy):
    """Never selects anything."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return torch.zeros_like(step.masked)


class Overwriting(UnmaskPolicy):
    """Selects committed positions without saying that it edits."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.confidence > 0.5


class LeakingBetweenRows(UnmaskPolicy):
    """Takes the threshold from the mean of the whole batch."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence >= step.confidence.mean())


class RememberingRequests(UnmaskPolicy):
    """Counts its calls on the object, and grows bolder."""

    def __init__(self) -> None:
        self.calls = 0

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        self.calls += 1
        return step.masked & (step.confidence >= 0.9 - min(self.calls * 0.02, 0.8))


class ChangingItsInput(UnmaskPolicy):
    """Works in place on the step's confidences."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence.mul_(0.9) > 0.5)


class NonDeterministic(UnmaskPolicy):
    """Draws from the global random numbers."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (torch.rand_like(step.confidence) < step.confidence)


class StateWithoutRows(UnmaskPolicy):
    """Keeps one number for all rows."""

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        return {"best": torch.zeros(1, device=device)}

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence > 0.7)


class Unpicklable(UnmaskPolicy):
    """Holds a lambda."""

    def __init__(self) -> None:
        self.rule: Callable[[Tensor], Tensor] = lambda confidence: confidence > 0.7

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & self.rule(step.confidence)


class ReadingBack(UnmaskPolicy):
    """Looks at the values on the host: a synchronisation at every step."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        if bool((step.confidence > 0.9).any()):
            return step.masked & (step.confidence > 0.9)
        return step.masked & (step.confidence > 0.7)


class NotBool(UnmaskPolicy):
    """Returns scores."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.confidence


CAUGHT_BY: dict[type[UnmaskPolicy], str] = {
    Stuck: "makes_progress",
    Overwriting: "selects_only_masked",
    LeakingBetweenRows: "keeps_rows_apart",
    RememberingRequests: "forgets_requests",
    ChangingItsInput: "leaves_its_input",
    NonDeterministic: "is_deterministic",
    StateWithoutRows: "state_is_per_row",
    Unpicklable: "can_be_copied",
    ReadingBack: "reads_nothing_back",
    NotBool: "answers_bool",
}
