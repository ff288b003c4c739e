"""What a forward pass of a bidirectional model computes, and what it reuses. Nothing here needs
vLLM.

The choices mean what they mean in the transformers adapter (`huggingface.forward.bidirectional`).
With a cache, a block's first step is a full pass over prompt and canvas; its later steps are
partial passes, which reuse the keys and values of all other positions as the full pass left them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from l2pd_adapters.families import CacheKind

Positions = TypeVar("Positions", int, Tensor)
"""One position, or one for each row."""


@dataclass(frozen=True)
class Passes:
    """The forward passes over blocks of L positions."""

    block_length: int
    logit_shift: int
    """The logits that predict position i are at position i - `logit_shift`."""

    def begin(self, block: Positions) -> Positions:
        """First position of a partial pass over the block that begins at `block`: the one whose
        logits predict the block's first. A full pass begins at 0.
        """
        return block - self.logit_shift

    def end(self, cache: CacheKind, block: int, *, last: int) -> int:
        """One past the last position of a partial pass: with "dual", of the block; with "prefix",
        of what is attended to, which ends at `last`. It is at least the block's, so that the block
        has all of its logits.
        """
        end = block + self.block_length
        return end if cache == "dual" else max(end, last)

    @property
    def width(self) -> int:
        """Positions of a partial pass of "dual", the same for every row."""
        return self.block_length + self.logit_shift
