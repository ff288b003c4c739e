"""Extremely greedy parallel: the oracle that the Learn2PD filter imitates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated

from pydantic import Field
from torch import Tensor

from l2pd_plugins.options import Below, Longest, policy_options
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy

_Tokens = Annotated[Sequence[Annotated[int, Field(ge=0), Below("vocabulary")]], Longest("canvas")]


@policy_options
class Oracle(UnmaskPolicy):
    """Unmask every position whose prediction already equals the reference answer.

    `reference` is the final answer, as token ids: one list for all rows, or one list per row.
    Without it the engine first decodes the reference at one token per step, which costs more than
    the oracle saves. The oracle is an upper bound for policies and not usable in serving.

    Source: Learn2PD, arXiv 2509.25188 ("extremely greedy parallel", EGP).
    """

    requires = frozenset({"reference"})

    reference: _Tokens | Sequence[_Tokens] | None = field(default=None, repr=False)

    def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
        return step.masked & (step.x0 == step.reference)
