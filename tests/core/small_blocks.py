"""Blocks of four positions, and policies that record the steps that they get."""

from __future__ import annotations

import torch

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.policy import DenoisingStep, UnmaskPolicy

LENGTH, VOCABULARY, MASK, EOT = 4, 9, 8, 7
OFF, END = EndOfText("off", ()), EndOfText("block", (EOT,))


class Failing(UnmaskPolicy):
    def select(self, step, state):
        raise ValueError("not today")


class Noting(UnmaskPolicy):
    """Records its steps and selects nothing."""

    def __init__(self, *requires: str, answer: bool = False) -> None:
        self.requires = frozenset({"confidence", *requires})
        self.answer = answer
        self.seen: list[DenoisingStep] = []

    def select(self, step, state):
        self.seen.append(step)
        return torch.full_like(step.masked, self.answer)


class Ahead(Noting):
    def __init__(self, *requires: str, fails: bool = False) -> None:
        super().__init__("ahead", *requires)
        self.fails = fails

    def init_state(self, batch_size, block_length, device):
        return {"calls": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def select(self, step, state):
        if self.fails and bool((step.block_index > 0).all()):
            raise ValueError("too far ahead")
        state["calls"] = state["calls"] + 1
        return super().select(step, state)


class Counting(UnmaskPolicy):
    def init_state(self, batch_size, block_length, device):
        return {"calls": torch.zeros(batch_size, dtype=torch.int64)}

    def select(self, step, state):
        state["calls"] = state["calls"] + 1
        return torch.zeros_like(step.masked)


class BeginsOnce:
    """Before a policy among a class's bases: its second call of `init_state` fails."""

    begun = False

    def init_state(self, batch_size, block_length, device):
        if self.begun:
            raise ValueError("not again")
        self.begun = True
        return super().init_state(batch_size, block_length, device)


def masks(rows: int) -> torch.Tensor:
    return torch.full((rows, LENGTH), MASK)


def started(policies: list[UnmaskPolicy], **fields) -> BlockBatch:
    """A batch of one masked block for each of the policies."""
    return BlockBatch.start(masks(len(policies)), policies, mask_token_id=MASK, **fields)


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, LENGTH, VOCABULARY, generator=generator) * 2


def fields_of(rows: int) -> dict[str, torch.Tensor | int]:
    """The fields of a batch at its first step, for `BlockBatch.resume`."""
    zeros = torch.zeros(rows, dtype=torch.int64)
    return {
        "tokens": masks(rows),
        "masked": torch.ones(rows, LENGTH, dtype=torch.bool),
        "present": torch.ones(rows, LENGTH, dtype=torch.bool),
        "step_index": zeros,
        "block_index": zeros,
        "canvas_length": zeros + LENGTH,
        "mask_token_id": MASK,
        "ignores_end": zeros.bool(),
    }
