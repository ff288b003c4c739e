"""LLaDA's random remasking: positions in random order."""

from __future__ import annotations

from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep
from l2pd_policies.draws import uniform
from l2pd_policies.fixed_schedule import FixedSchedule


@policy_options
class RandomOrder(FixedSchedule):
    """Unmask positions drawn at random, as many per step as `fixed_schedule` does.

    Every order is equally likely, whatever the model predicts. It needs a seed, and raises an
    L2PDError without one.

    Source: LLaDA, arXiv 2502.09992 (Algorithm 4), `remasking="random"` of its code, which draws
    from one generator for the whole batch; here each row has its own.
    """

    def score(self, step: DenoisingStep) -> Tensor:
        return uniform(step, self.name)
