"""LLaDA2.1's threshold rule that also edits committed tokens."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy


@policy_options
class LLaDA2Edit(UnmaskPolicy):
    """Unmask above one threshold, and overwrite committed tokens above another.

    A masked position is unmasked at confidence > `threshold`. If the model predicts a different
    token for a committed position with confidence > `edit_threshold`, that token replaces the
    committed one.

    Source: LLaDA2.1's joint threshold decoding (SGLang: JointThreshold), quality mode 0.7 and 0.5;
    speed mode is 0.5 and 0.0. In SGLang a finished block may be edited for up to 16 further steps;
    here a block ends when no mask is left.
    """

    requires = frozenset({"committed"})
    edits = True
    row_options = frozenset({"threshold", "edit_threshold"})

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.7
    edit_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        differs = ~step.masked & step.present & (step.x0 != step.tokens)
        return (step.masked & (step.confidence > self.threshold)) | (
            differs & (step.confidence > self.edit_threshold)
        )
