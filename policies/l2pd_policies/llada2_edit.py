"""LLaDA2.1's threshold that also edits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy


@policy_options
class LLaDA2Edit(UnmaskPolicy):
    """Unmask above one threshold, and overwrite committed tokens above another.

    A masked position is taken at confidence > `threshold`; a committed token for which the model
    predicts another with confidence > `edit_threshold` is replaced by that.

    Source: LLaDA2.1's joint threshold decoding (SGLang: JointThreshold), quality mode 0.7 and 0.5;
    speed mode is 0.5 and 0.0. There a finished block may be edited for up to 16 further steps;
    here a block ends with its last mask.
    """

    requires = frozenset({"committed"})
    edits = True

    threshold: Annotated[float, Field(ge=0, le=1)] = 0.7
    edit_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        differs = ~step.masked & step.present & (step.x0 != step.tokens)
        return (step.masked & (step.confidence > self.threshold)) | (
            differs & (step.confidence > self.edit_threshold)
        )
