from typing import Annotated, Literal

import torch
from pydantic import Field

from l2pd_plugins import UnmaskPolicy
from l2pd_plugins.options import policy_options
from l2pd_plugins.selection import top_1


@policy_options
class Raising(UnmaskPolicy):
    """One token a step, and an error at the step `after` of a block and all later ones."""

    after: Annotated[int, Field(ge=0)] = 2
    where: Literal["select", "init_state"] = "select"

    def init_state(self, batch_size, block_length, device):
        if self.where == "init_state":
            raise ValueError("raised on purpose")
        return {}

    def select(self, step, state):
        if int(step.step_index.max()) >= self.after:
            raise ValueError("raised on purpose")
        return top_1(step.confidence, step.masked)


@policy_options
class Persistent(UnmaskPolicy):
    """What was predicted at the step before as well: a decision that rests on the state alone."""

    def init_state(self, batch_size, block_length, device):
        return {"x0": torch.full((batch_size, block_length), -1, device=device)}

    def select(self, step, state):
        stands = step.x0 == state["x0"]
        state["x0"] = step.x0
        return step.masked & stands


@policy_options
class Coin(UnmaskPolicy):
    """Any position, by the toss of a coin."""

    def select(self, step, state):
        tosses = [torch.rand(step.masked.shape[1], generator=each) for each in step.generator]
        return step.masked & (torch.stack(tosses) < 0.3)
