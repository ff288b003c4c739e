"""Hierarchy decoding: one token from every run of masks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy
from l2pd_plugins.selection import ranks


@policy_options
class Hierarchy(UnmaskPolicy):
    """Unmask the most confident position of every run of masks, and all that are very confident.

    The best position of a run is unmasked above `low_threshold`, any position above `threshold`.
    Committed tokens split the runs, so that each step divides the remaining masks.

    Source: hierarchy decoding as in dInfer (HierarchyDecoder), defaults 0.4 and 0.9. dInfer can
    also remask, which is off by default and not implemented here, and it decodes one sequence at a
    time.
    """

    row_options = frozenset({"threshold", "low_threshold"})

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.9
    low_threshold: Annotated[float, Field(ge=0, le=1)] = 0.4

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        run = (~step.masked).cumsum(-1)
        rank = ranks(step.confidence, step.masked)
        rows, length = rank.shape
        first = rank.new_full((rows, length + 1), length).scatter_reduce(-1, run, rank, "amin")
        best = step.masked & (rank == first.gather(-1, run))
        return (best & (step.confidence > self.low_threshold)) | (
            step.masked & (step.confidence > self.threshold)
        )
