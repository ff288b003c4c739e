"""One denoising step of a batch of blocks: statistics -> select -> progress -> commit -> end.

Every engine calls `denoising_step` after its forward pass. Nothing here knows an engine or a
policy, and nothing reads a value back to the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.end_of_text import EndOfText, behind_end, is_end_of_text
from l2pd_plugins.group_answers import ask, joined, of_group, put_group, seen_by
from l2pd_plugins.policy import DenoisingStep
from l2pd_plugins.policy_calls import OnError
from l2pd_plugins.progress_rules import progress_of
from l2pd_plugins.sampling import sample_tokens
from l2pd_plugins.selection import ranks
from l2pd_plugins.statistics import RowStatistics, row_statistics

_COMPUTED = frozenset({"confidence", "entropy", "margin"})


@dataclass(frozen=True)
class StepOutcome:
    """The result of a denoising step; tensors are (B, L) bool unless their description differs."""

    step: DenoisingStep
    """The step before the commits, with all computed statistics; a policy saw only what it
    requires.
    """
    committed: Tensor
    remasked: Tensor
    behind: Tensor
    """Positions that this step found to be after the end of the text: they now hold end-of-text and
    are no longer present.
    """
    ended: Tensor
    """(B,) bool: rows whose text ends in this block."""
    sound: Tensor
    """Positions that were masked before the step and whose logits hold no NaN."""
    selected: Tensor
    """The masked positions that the policies selected, without what a progress rule added."""
    failed: frozenset[int] = frozenset()
    """Rows whose policy failed in this step, or has failed so that a stand-in runs instead."""

    @property
    def forced(self) -> Tensor:
        """(B,) bool: rows with masks in which only the progress rule decided, since the policy
        selected no masked position, or failed.
        """
        return self.step.masked.any(-1) & ~self.selected.any(-1)


def denoising_step(
    block: BlockBatch,
    logits: Tensor,
    positions: Tensor | None = None,
    *,
    end_of_text: EndOfText,
    x0: Tensor | None = None,
    suppress_mask: bool = True,
    on_error: OnError | None = None,
    later: tuple[Tensor, Tensor] | None = None,
    places: Sequence[int] | np.ndarray | None = None,
) -> StepOutcome:
    """Take one denoising step; `block` is updated in place.

    Args:
        block: the current blocks. Rows without masks are not changed.
        logits: (N, V), or (B, L, V) for every position of the block.
        positions: (N,) int64, ``row * L + position`` of each row of logits; it must cover
            `block.needed()`. None if logits are given for every position; with logits (B, L, V),
            the positions that are read, in place.
        end_of_text: the end-of-text rule to apply.
        x0: (N,) tokens to predict, -1 for the argmax; None for those that rows with `sampling`
            draw, and the argmax everywhere else. With suppress_mask the mask token, too, means the
            argmax.
        suppress_mask: never predict the mask token. False is for exact parity with code that does
            not suppress it (LLaDA, Fast-dLLM): a position that is selected and whose prediction is
            the mask token stays masked, counts as what the step selected, and is decoded again.
            So that the block ends, this holds for its first L steps, as many as that code takes at
            most; from then on the row's mask token is suppressed.
        on_error: for this call only, instead of the batch's own `on_error`.
        later: for a batch that looks ahead (`BlockBatch.look_ahead`), the logits (M, V) of its
            later blocks and where they belong, (M,) int64, ``block * L + position``, blocks in the
            order of `BlockBatch.later_rows`; they must cover all masked positions of these blocks.
        places: `positions` on the host, needed if both are given and a row has `sampling`. -1 for
            positions that are not masked saves their draw; the result is the same.

    A block that has masks has fewer of them afterwards, whatever the policy selects (without
    suppress_mask from its step L on, so that a block ends in 2 L steps at most). Positions whose
    logits hold NaN (their confidence is then NaN) are never selected; the progress rule commits one
    if no other mask is left.

    Raises PolicyRuntimeError, with the policy's name and the method's, if a policy raises or breaks
    its contract and on_error is "raise". A policy that writes to its input is not called again in
    this block.
    """
    on_error = block.on_error if on_error is None else on_error
    if x0 is None and block.sampling is not None:
        mask, flat = block.mask_token_id if suppress_mask else None, logits.flatten(0, -2)
        when = block.block_index, block.step_index
        if positions is None or logits.ndim == 2:
            x0 = sample_tokens(flat, positions, places, block.sampling, block.masked, when, mask)
        else:
            if places is None:
                raise ValueError(
                    "places=None: rows that draw need their positions on the host, too"
                )
            drawn = np.full(len(flat), -1)
            read = np.asarray(places, dtype=np.int64)
            read = read[read >= 0]
            drawn[read] = read
            x0 = sample_tokens(flat, None, drawn, block.sampling, block.masked, when, mask)
            x0 = x0.index_select(0, positions)
    step = _observe(block, logits, positions, x0, suppress_mask)
    _look_ahead(block, later, suppress_mask, on_error)
    sound = block.masked & ~step.confidence.isnan()
    decided, chosen = [], []
    failed: set[int] = set()
    waiting = deque(block._groups)
    while waiting:
        group = waiting.popleft()
        seen = seen_by(step, group, block, on_error)
        has_logits = seen.has("logits")
        answer = ask(group, "select", seen, block, on_error)
        if answer is None:
            parts = block._groups.split(group)
            if parts:
                waiting.extendleft(reversed(parts))
                continue
            # The policy may have written to its input. If it has the whole batch, that input is not
            # a copy, so it is not called again; if it was given the logits, everything else was a
            # copy.
            if group.index is None and not has_logits:
                step = _observe(block, logits, positions, x0, suppress_mask)
            seen = seen_by(step, group, block, on_error)
            answer = torch.zeros_like(seen.masked)
            failed.update(group.members)
        if group.runner.stands_in:
            failed.update(group.members)
        candidates = of_group(sound, group)
        selected = answer & candidates
        chosen.append(selected)
        # From the core's own tensors: a policy may have written to those that it was given.
        confidence, masked = of_group(step.confidence, group), of_group(block.masked, group)
        rule = group.runner.traits.progress
        selected = selected | progress_of(rule, selected, confidence, masked, candidates)
        if group.runner.traits.edits:
            ignores_end = of_group(block.ignores_end, group)
            selected = selected | (answer & _editable(seen, ignores_end, end_of_text))
        decided.append(selected)
    committed, selected = joined(block, decided), joined(block, chosen)
    if not suppress_mask:
        committed &= step.x0 != block.mask_token_id

    tokens = torch.where(committed, step.x0, block.tokens)
    remasked = torch.zeros_like(committed)
    if any(group.runner.traits.remasks for group in block._groups):
        masked = block.masked & ~committed
        # At most one fewer than were committed, so that the block ends; none if nothing was
        # committed.
        allowed = ((committed & block.masked).sum(-1, keepdim=True) - 1).clamp_(min=0)
        open_to_it = ~masked & block.present
        if end_of_text.rule != "off":  # positions after an end of text stay cut
            ends = is_end_of_text(tokens, end_of_text.token_ids)
            open_to_it &= ~ends | block.ignores_end.unsqueeze(-1)
        waiting = deque(block._groups)
        while waiting:
            group = waiting.popleft()
            if group.runner.traits.remasks:
                seen = seen_by(step, group, block, on_error)
                # Copies: a policy may write to them, and the step goes on with its own.
                after = seen.changed(
                    tokens=of_group(tokens, group).clone(), masked=of_group(masked, group).clone()
                )
                answer = ask(group, "remask", after, block, on_error)
                if answer is None:
                    parts = block._groups.split(group)
                    waiting.extend(parts)
                    failed.update([] if parts else group.members)
                    continue
                back = answer & of_group(open_to_it, group)
                put_group(
                    remasked,
                    group,
                    back & (ranks(-seen.confidence, back) < of_group(allowed, group)),
                )
        tokens = tokens.masked_fill(remasked, block.mask_token_id)

    block.step_index = block.step_index + block.masked.any(-1)
    block.set_tokens(tokens)
    if end_of_text.rule == "off":
        nowhere = torch.zeros_like(committed)
        return StepOutcome(
            step, committed, remasked, nowhere, nowhere[:, 0], sound, selected, frozenset(failed)
        )

    settled = torch.where(block.present, tokens, block.mask_token_id)
    ended, behind = behind_end(settled, block.masked, step.x0, step.confidence, end_of_text)
    ended = ended & ~block.ignores_end
    behind = behind & block.present & ended.unsqueeze(-1)
    kept = ~behind
    block.set_tokens(tokens.masked_fill(behind, end_of_text.token_ids[0]), block.present & kept)
    return StepOutcome(
        step, committed & kept, remasked & kept, behind, ended, sound, selected, frozenset(failed)
    )


def _look_ahead(
    block: BlockBatch,
    logits: tuple[Tensor, Tensor] | None,
    suppress_mask: bool,
    on_error: OnError,
) -> None:
    """Pass the predictions for the later blocks to the policies; only their states change."""
    if (block._later is None) != (logits is None):
        raise ValueError(
            f"a batch with {len(block.later_rows)} later blocks and "
            f"{'no' if logits is None else 'some'} logits for them"
        )
    if block._later is None or logits is None:
        return
    blocks = block._later.blocks
    step = _observe(blocks, *logits, None, suppress_mask)
    waiting = deque(blocks._groups)
    while waiting:
        group = waiting.popleft()
        seen = seen_by(step, group, blocks, on_error)
        if ask(group, "select", seen, blocks, on_error) is None:
            waiting.extend(blocks._groups.split(group))


def _observe(
    block: BlockBatch,
    logits: Tensor,
    positions: Tensor | None,
    x0: Tensor | None,
    suppress_mask: bool,
) -> DenoisingStep:
    """The statistics of the given rows of logits, scattered to the positions of the blocks."""
    rows, length = block.tokens.shape
    flat = logits.flatten(0, -2)
    if positions is None and len(flat) != rows * length:
        raise ValueError(f"logits of {len(flat)} rows for {rows} blocks of {length} positions")
    requires = block.requires
    suppress = block.mask_token_id if suppress_mask else None
    if suppress is not None and x0 is not None:
        x0 = torch.where(x0 == suppress, -1, x0)
    needed = block.needed()
    given = positions if logits.ndim == 3 else None
    if positions is None:  # logits of all positions were given: skip those that are not needed
        every = torch.arange(rows * length, device=flat.device)
        given = torch.where(needed.flatten(), every, -1)
    found = row_statistics(flat, requires & _COMPUTED, suppress, x0=x0, rows=given)
    if not suppress_mask and block.mask_token_id >= 0:
        found = _suppressed_late(found, block, flat, positions, x0, given)

    def lay_out(values: Tensor, elsewhere: Tensor) -> Tensor:
        if positions is None:
            full = values.view(rows, length)
        else:
            full = elsewhere.flatten().index_copy(0, positions, values).view(rows, length)
        return torch.where(needed, full, elsewhere)

    predicted = lay_out(found.x0, block.tokens)
    # Committed positions have confidence 1. A masked one without logits has the lowest confidence.
    committed = (block.present > block.masked).to(torch.float32)
    confidence = lay_out(found.confidence, committed)
    entropy = margin = cube = None
    if found.entropy is not None:
        entropy = lay_out(found.entropy, torch.zeros_like(committed))
    if found.margin is not None:
        margin = lay_out(found.margin, block.present.to(torch.float32))
    if "logits" in requires:
        if positions is None or given is not None:
            cube = flat.view(rows, length, flat.shape[1])
        else:
            assert positions is not None  # otherwise all rows are given
            cube = logits.new_zeros(rows * length, flat.shape[1])
            cube = cube.index_copy_(0, positions, flat).view(rows, length, flat.shape[1])
    return DenoisingStep(
        tokens=block.tokens,
        masked=block.masked,
        x0=predicted,
        confidence=confidence,
        entropy=entropy,
        margin=margin,
        logits=cube,
        step_index=block.step_index,
        block_index=block.block_index,
        canvas_length=block.canvas_length,
        present=block.present,
        mask_token_id=block.mask_token_id,
        reference=block.reference,
    )


def _suppressed_late(
    found: RowStatistics,
    block: BlockBatch,
    logits: Tensor,
    positions: Tensor | None,
    x0: Tensor | None,
    given: Tensor | None,
) -> RowStatistics:
    """Statistics (N,) in which rows that have taken L steps do not predict the mask token."""
    length = block.tokens.shape[1]
    late = block.step_index >= length
    if positions is None:
        here = late.repeat_interleave(length)
    else:
        here = late.index_select(0, positions.div(length, rounding_mode="floor"))
    every = torch.arange(len(logits), device=logits.device) if given is None else given
    mask = block.mask_token_id
    asked = frozenset(n for n in ("entropy", "margin") if getattr(found, n) is not None)
    instead = row_statistics(
        logits,
        asked,
        mask,
        x0=None if x0 is None else torch.where(x0 == mask, -1, x0),
        rows=torch.where(here, every, -1),
    )

    def chosen(name: str) -> Any:
        early = getattr(found, name)
        return None if early is None else torch.where(here, getattr(instead, name), early)

    return RowStatistics(**{each.name: chosen(each.name) for each in fields(RowStatistics)})


def _editable(step: DenoisingStep, ignores_end: Tensor, end_of_text: EndOfText) -> Tensor:
    """bool (B, L): the committed positions whose prediction is valid and differs from their token.
    ignores_end: (B,) bool, rows in which end-of-text tokens have no special meaning.
    """
    differs = (step.x0 != step.tokens) & ~step.masked & step.present & step.masked.any(-1, True)
    if end_of_text.rule != "off":  # positions after an end of text stay cut
        ends = is_end_of_text(step.tokens, end_of_text.token_ids)
        differs &= ~ends | ignores_end.unsqueeze(-1)
    return differs & ~step.confidence.isnan()
