"""The position of each request in its canvas: buffers with one row for each of vLLM's slots.

vLLM keeps its requests in slots, and the core keeps their current blocks in the same slots
(`BlockSlots`). This module adds the position of the block in the sequence, and what to do when it
is finished. The two kinds of models differ in how a finished block is used by the next:

- Block-causal: its keys and values are final after a forward pass over its final tokens. So a block
  is emitted after the pass that follows its last commit, unless the text ends in it.
- Bidirectional: each commit changes the keys and values of the whole sequence, so each forward pass
  computes the whole prompt and canvas; with a cache, only the first of each block does (`passes`).
  A finished block is emitted at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from l2pd_adapters.vllm.log_probabilities import LogProbabilities
from l2pd_adapters.vllm.passes import Passes
from l2pd_plugins import UnmaskPolicy
from l2pd_plugins.block_layout import Attention, BlockLayout, begun_by_prompt
from l2pd_plugins.sampling import Sampling
from l2pd_plugins.slots import BlockSlots, SlotBatch
from l2pd_plugins.upload import upload


class Canvases(ABC):
    """The canvases of all slots; positions are counted from the prompt's first token."""

    attention: ClassVar[Attention]

    def __init__(
        self,
        slots: int,
        block_length: int,
        max_model_len: int,
        mask_token_id: int,
        device: torch.device,
    ) -> None:
        self.block_length, self.max_model_len = block_length, max_model_len
        self.mask_token_id, self.device = mask_token_id, device
        self.blocks = BlockSlots(slots, block_length, mask_token_id=mask_token_id, device=device)
        self.columns = torch.arange(block_length, device=device)
        self.log_probabilities = LogProbabilities(slots, block_length, device)

        def room(*shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=torch.int64, device=device)

        self.start = room()
        """(S,) int64: first position of the block."""
        self.known = room()
        """(S,) int64: number of positions of the block that belong to the prompt."""
        self.limit = room()
        """(S,) int64: one past the last position of the answer."""
        self.nfe = room()
        """(S,) int64: denoising steps so far."""
        self.given_out = room()
        """(S,) int64: tokens emitted so far."""
        self.reference: Tensor | None = None
        """(S, positions) int64: references for policies that require them; allocated at the first
        such policy.
        """

    def assign(
        self,
        slot: int,
        policy: UnmaskPolicy,
        text: Sequence[int],
        prompt_length: int,
        max_tokens: int,
        *,
        ignores_end: bool,
        generator: torch.Generator,
        sampling: Sampling | None = None,
        top: int = -1,
    ) -> None:
        """Begin a request, or continue a preempted one: `text` is its prompt and the tokens emitted
        so far. top: how many of the most probable tokens it wants at each position, -1 for no
        log-probabilities.
        """
        limit = min(prompt_length + max_tokens, self.max_model_len)
        layout = BlockLayout.of(
            self.attention, prompt_length, limit - prompt_length, self.block_length
        )
        begun = layout.block_at(len(text))
        start = layout.start_of(begun)
        masks = [self.mask_token_id] * (start + self.block_length - len(text))
        self.blocks.assign(
            slot,
            policy,
            [*text[start:], *masks],
            [
                present and start + column >= len(text)
                for column, present in enumerate(layout.present_in(begun))
            ],
            block_index=begun,
            canvas_length=layout.canvas_length,
            ignores_end=ignores_end,
            generator=generator,
            sampling=sampling,
        )
        self.log_probabilities.assign(slot, top)
        for buffer, value in (
            (self.start, start),
            (self.known, len(text) - start),
            (self.limit, limit),
            (self.nfe, 0),
            (self.given_out, 0),
        ):
            buffer[slot].fill_(value)
        self._refer(slot, policy, prompt_length)

    def release(self, slot: int) -> None:
        """Forget the slot's request."""
        self.blocks.release(slot)
        self.log_probabilities.release(slot)

    def take(self, slots: np.ndarray) -> SlotBatch:
        """The blocks of these slots for one step."""
        batch = self.blocks.take(slots)
        if self.reference is not None:
            at = self._at(self.start, batch).unsqueeze(-1) + self.columns
            batch.block.set_reference(self.reference[batch.index.unsqueeze(-1), at])
        return batch

    def settled(self, batch: SlotBatch) -> tuple[Tensor, Tensor]:
        """The tokens of each block, starting with the first after the prompt, (B, L), and the
        number of them that belong to the answer, (B,).
        """
        known = self._at(self.known, batch)
        room = self._at(self.limit, batch) - self._at(self.start, batch) - known
        present = batch.block.present.sum(-1)
        at = self.columns_after_prompt(batch)
        return batch.block.tokens.gather(1, at), torch.minimum(present, room)

    def columns_after_prompt(self, batch: SlotBatch) -> Tensor:
        """(B, L): the columns of each block, starting with the first after the prompt."""
        known = self._at(self.known, batch).unsqueeze(-1)
        return (known + self.columns).clamp(max=self.block_length - 1)

    def count(self, batch: SlotBatch, stepped: Tensor, given_out: Tensor) -> None:
        """Record for the log which rows took a denoising step, and how many tokens they emit."""
        self.nfe.index_add_(0, batch.index, stepped.to(torch.int64))
        self.given_out.index_add_(0, batch.index, given_out)

    def file(self, batch: SlotBatch, ready: Tensor, ended: Tensor) -> None:
        """Store the result of the step; rows that are `ready` move to the next block."""
        start = self._at(self.start, batch) + ready * self.block_length
        tokens = torch.full_like(batch.block.tokens, self.mask_token_id)
        batch.advance(ready, tokens, self._present(batch, start))
        self.start.index_copy_(0, batch.index, start)
        self.known.index_copy_(0, batch.index, self._at(self.known, batch).masked_fill(ready, 0))
        self.blocks.put(batch)

    @abstractmethod
    def ready(self, batch: SlotBatch, was_full: Tensor, is_full: Tensor, ended: Tensor) -> Tensor:
        """(B,) bool: which blocks are ready to be emitted. was_full, is_full: (B,) bool, before and
        after the step; ended: (B,) bool, whether the text has ended.
        """

    @abstractmethod
    def taken_back(self, batch: SlotBatch, ready: Tensor, first: Tensor, queries: Tensor) -> Tensor:
        """(B,): by how much vLLM's count of each row's computed positions, which includes this
        pass, must be reduced. The pass has computed `queries` (B,) positions from `first` (B,) on;
        ready: (B,) bool, which blocks are emitted.
        """

    @abstractmethod
    def seen(self, batch: SlotBatch) -> Tensor:
        """(B,): one past the last position that each row attends to, for the scheduler; 0 if it
        need not know.
        """

    @abstractmethod
    def taken_back_after_prompt(self, lengths: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """How many of its queries each request must compute again after its prompt was read;
        lengths: those of the prompts.
        """

    @abstractmethod
    def _present(self, batch: SlotBatch, start: Tensor) -> Tensor:
        """(B, L) bool: which positions of the blocks that begin at `start` belong to the canvas."""

    def _at(self, buffer: Tensor, batch: SlotBatch) -> Tensor:
        return buffer.index_select(0, batch.index)

    def _refer(self, slot: int, policy: UnmaskPolicy, prompt_length: int) -> None:
        if "reference" not in policy.requires:
            return
        if self.reference is None:
            shape = (len(self.start), self.max_model_len + self.block_length)
            self.reference = torch.zeros(shape, dtype=torch.int64, device=self.device)
        given: Any = policy.reference or ()
        tokens = upload(given[: self.max_model_len - prompt_length], self.device, torch.int64)
        self.reference[slot].zero_()
        self.reference[slot, prompt_length : prompt_length + len(tokens)] = tokens


class BlockCausalCanvases(Canvases):
    """For models whose blocks are counted from the prompt's first token."""

    attention = "block_causal"

    def ready(self, batch: SlotBatch, was_full: Tensor, is_full: Tensor, ended: Tensor) -> Tensor:
        end = self._at(self.start, batch) + self.block_length
        last = ended | (end >= self._at(self.limit, batch))  # no block needs its KV
        return was_full | (is_full & last)

    def taken_back(self, batch: SlotBatch, ready: Tensor, first: Tensor, queries: Tensor) -> Tensor:
        return torch.where(ready, 0, queries)

    def seen(self, batch: SlotBatch) -> Tensor:
        return torch.zeros_like(batch.index)

    def taken_back_after_prompt(self, lengths: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """The block that begins with the end of the prompt is read again, with its masks."""
        return begun_by_prompt(lengths, self.block_length)

    def _present(self, batch: SlotBatch, start: Tensor) -> Tensor:
        return torch.ones_like(batch.block.present)


class BidirectionalCanvases(Canvases):
    """For models that attend to the whole prompt and canvas."""

    attention = "bidirectional"

    def __init__(
        self, slots: int, block_length: int, max_model_len: int, *rest: Any, logit_shift: int = 0
    ) -> None:
        super().__init__(slots, block_length, max_model_len, *rest)
        self.passes = Passes(block_length, logit_shift)
        shape = (slots, max_model_len + block_length)
        self.text = torch.zeros(shape, dtype=torch.int64, device=self.device)
        """(S, positions) int64: prompt and canvas, with up to one additional block after the
        longest.
        """
        self.visible = torch.zeros_like(self.start)
        """(S,) int64: one past the last position that is attended to: the end of the canvas or of
        the text.
        """
        self.cached = torch.zeros(slots, dtype=torch.bool, device=self.device)
        """(S,) bool: whether the steps of a block after its first are partial passes."""

    def assign(
        self,
        slot: int,
        policy: UnmaskPolicy,
        text: Sequence[int],
        prompt_length: int,
        max_tokens: int,
        *,
        cached: bool = False,
        **rest: Any,
    ) -> None:
        """As in the base class; cached: whether the request has a cache."""
        super().assign(slot, policy, text, prompt_length, max_tokens, **rest)
        self.text[slot].fill_(self.mask_token_id)
        self.text[slot, : len(text)] = upload(text, self.device)
        self.visible[slot].copy_(self.limit[slot])
        self.cached[slot].fill_(cached)

    def ready(self, batch: SlotBatch, was_full: Tensor, is_full: Tensor, ended: Tensor) -> Tensor:
        return is_full

    def taken_back(self, batch: SlotBatch, ready: Tensor, first: Tensor, queries: Tensor) -> Tensor:
        """So much that the next pass begins where it must: a full one at 0, a partial one at its
        block. (After a full pass of a block, this is more than the pass has computed before it.)
        """
        partial = self._at(self.cached, batch) & ~ready
        begin = torch.where(partial, self.passes.begin(self._at(self.start, batch)), 0)
        return first + queries - begin

    def seen(self, batch: SlotBatch) -> Tensor:
        return self._at(self.visible, batch)

    def taken_back_after_prompt(self, lengths: np.ndarray, queries: np.ndarray) -> np.ndarray:
        return queries

    def file(self, batch: SlotBatch, ready: Tensor, ended: Tensor) -> None:
        start = self._at(self.start, batch)
        columns = start.unsqueeze(-1) + self.columns
        self.text[batch.index.unsqueeze(-1), columns] = batch.block.tokens
        end = start + batch.block.present.sum(-1)
        seen = torch.where(ended, end, self._at(self.visible, batch))
        self.visible.index_copy_(0, batch.index, seen)
        super().file(batch, ready, ended)

    def _present(self, batch: SlotBatch, start: Tensor) -> Tensor:
        columns = start.unsqueeze(-1) + self.columns
        return columns < self._at(self.limit, batch).unsqueeze(-1)
