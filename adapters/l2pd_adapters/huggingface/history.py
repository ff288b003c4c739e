"""The history of each position: when it was committed, and with what probability."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from l2pd_adapters.huggingface.rows import Row, RowTensors, keep_rows
from l2pd_plugins.denoising import StepOutcome
from l2pd_plugins.end_of_text import EndOfText, is_end_of_text
from l2pd_plugins.once import Once
from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.policy_attributes import description_of, fingerprint_of, printable_name_of
from l2pd_plugins.trace import Trace

logger = logging.getLogger(__name__)

WARN_ABOVE = 0.25
"""Share of tokens above which `warn_of_fallback` warns."""
IDLE_FROM, IDLE_BELOW = 32, 1.05
"""Least number of tokens, and tokens per forward pass, of `warn_of_idle_weights`."""
_first, _first_idle = Once(), Once()


@dataclass(frozen=True)
class Decoded:
    """Answers of B sequences; G is the number of canvas positions after the prompt."""

    whole: Tensor
    """(B, G' >= G) int64: tokens; after an end of text, the end-of-text token. The positions after
    the canvas are the rest of the last block, which a block-causal model also decodes.
    """
    trace: Trace
    reference_nfe: Tensor | None = None
    """(B,) int64: forward passes of reference decodes that were made before."""

    @property
    def tokens(self) -> Tensor:
        """(B, G) int64: the tokens of the canvas only."""
        return self.whole[:, : self.trace.committed_at.shape[1]]


def warn_of_fallback(policies: Sequence[UnmaskPolicy], trace: Trace) -> None:
    """Warn, once per policy and process, if a policy's fallback decided more than a quarter of its
    tokens. policies: that of each row of the trace.
    """
    if trace.fallback is None:
        return
    decided, lengths = trace.fallback.sum(-1).tolist(), trace.length.tolist()
    for policy in {id(policy): policy for policy in policies}.values():
        rows = [row for row, each in enumerate(policies) if each is policy]
        total = max(1, sum(lengths[row] for row in rows))
        share = sum(decided[row] for row in rows) / total
        if share > WARN_ABOVE and _first(description_of(policy)):
            logger.warning(
                "policy %s: its fallback decided %.0f %% of %d tokens, in blocks unlike those that "
                "it was trained on: other texts, or another block length",
                printable_name_of(policy),
                100 * share,
                total,
            )


def warn_of_idle_weights(policies: Sequence[UnmaskPolicy], trace: Trace) -> None:
    """Warn, once per policy and process, if a policy with trained weights needed about as many
    forward passes as tokens: its weights select next to nothing. policies: that of each row.
    """
    passes, lengths = trace.nfe.tolist(), trace.length.tolist()
    for policy in {id(policy): policy for policy in policies}.values():
        rows = [row for row, each in enumerate(policies) if each is policy]
        total, nfe = sum(lengths[row] for row in rows), sum(passes[row] for row in rows)
        if total < IDLE_FROM or total > IDLE_BELOW * nfe or not fingerprint_of(policy):
            continue
        if _first_idle(description_of(policy)):
            logger.warning(
                "policy %s: its trained weights accept next to nothing here: %d tokens took %d "
                "forward passes, no fewer than one token per step takes",
                printable_name_of(policy),
                total,
                nfe,
            )


@dataclass
class BlockHistory:
    """The history of the current blocks of the R live rows."""

    committed_at: Tensor
    """(R, L) int64: forward pass of the commit, from 0; -1 if not committed yet."""
    confidence: Tensor
    """(R, L) float32: probability of the token at its commit."""
    broken: Tensor
    """(R, L) bool: positions whose logits contained NaN."""
    fallback: Tensor
    """(R, L) bool: positions that a policy's fallback committed."""

    @classmethod
    def start(cls, columns: Tensor) -> BlockHistory:
        """An empty history for blocks at these columns (R, L)."""
        return cls(
            torch.full_like(columns, -1),
            torch.zeros_like(columns, dtype=torch.float32),
            torch.zeros_like(columns, dtype=torch.bool),
            torch.zeros_like(columns, dtype=torch.bool),
        )

    def record(
        self, outcome: StepOutcome, forward: int, *, may_undo: bool, fallback: Tensor | None = None
    ) -> None:
        """Record the step after this forward pass.

        Args:
            may_undo: whether a step can remask tokens that an earlier step committed.
            fallback: (R,) bool, rows in which a fallback decided the step; None if no policy has
                one.
        """
        committed, step = outcome.committed, outcome.step
        at = torch.where(committed, forward, self.committed_at)
        confidence = torch.where(committed, step.confidence, self.confidence)
        if may_undo:
            undone = outcome.remasked | outcome.behind
            at, confidence = at.masked_fill(undone, -1), confidence.masked_fill(undone, 0.0)
        self.committed_at, self.confidence = at, confidence
        if fallback is not None:
            told = fallback.unsqueeze(-1) & committed
            self.fallback = torch.where(committed, told, self.fallback)
        self.broken = self.broken | (step.masked ^ outcome.sound)

    def restart(self, at: Tensor | slice) -> None:
        """Clear the history of these rows."""
        fresh = BlockHistory.start(self.committed_at[at])
        for each in fields(self):
            value = getattr(fresh, each.name)
            if isinstance(at, Tensor):
                value = getattr(self, each.name).index_copy(0, at, value)
            setattr(self, each.name, value)

    def keep(self, index: Tensor) -> None:
        """Keep the rows of this index (K,), in this order."""
        keep_rows(self, index)


class History:
    """The history of all B sequences of a call, over all columns."""

    def __init__(self, tokens: Tensor) -> None:
        """tokens: (B, W) int64, prompts and canvases at the start."""
        batch = len(tokens)
        self.answers = tokens.clone()
        self.committed_at = torch.full_like(tokens, -1)
        self.confidence = torch.zeros_like(tokens, dtype=torch.float32)
        self.broken = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
        self.fallback = torch.zeros_like(tokens, dtype=torch.bool)
        self.nfe = [0] * batch
        self.length = [0] * batch
        """Number of tokens of each answer, up to and including the end of text."""
        self.ahead = [0] * batch

    def file_blocks(self, blocks: BlockHistory, tensors: RowTensors, at: Tensor | slice) -> None:
        """Store the history of the full blocks of these rows."""
        sequences = tensors.sequences[at]
        where = (sequences.unsqueeze(-1), tensors.columns[at])
        self.committed_at[where] = blocks.committed_at[at]
        self.confidence[where] = blocks.confidence[at]
        self.broken[sequences] |= blocks.broken[at].any(-1)
        self.fallback[where] = blocks.fallback[at]

    def file_answers(
        self, rows: Sequence[Row], tensors: RowTensors, at: Tensor, forwards: int
    ) -> None:
        """Store the answers of rows (K,) that leave after `forwards` forward passes."""
        self.answers[tensors.sequences[at]] = tensors.tokens[at]
        for row in rows:
            self.nfe[row.sequence] = forwards
            self.length[row.sequence] = row.last - row.layout.begin
            self.ahead[row.sequence] = row.ahead

    def result(
        self, prompt_length: int, size: int, end_of_text: EndOfText, *, has_fallback: bool = False
    ) -> Decoded:
        """The answers, after the last row has left: canvases of `size` positions after the
        prompts. has_fallback: whether a policy has a fallback, so that the trace shows it.
        """
        broken = self.broken.nonzero().flatten().tolist()
        if broken:
            logger.warning(
                "the model's logits contain NaN, or only -inf, in sequence(s) %s: such "
                "predictions are committed last and are meaningless",
                ", ".join(map(str, broken)),
            )
        device = self.answers.device
        whole = self.answers[:, prompt_length:]
        committed_at, confidence = (
            history[:, prompt_length : prompt_length + size]
            for history in (self.committed_at, self.confidence)
        )
        length = torch.tensor(self.length, device=device).clamp(max=size)
        if end_of_text.rule == "off":
            ends = is_end_of_text(whole[:, :size], end_of_text.token_ids)
            length = torch.where(ends.any(-1), ends.to(torch.int64).argmax(-1) + 1, size)
        else:
            behind = torch.arange(whole.shape[1], device=device) >= length.unsqueeze(-1)
            behind &= (length < size).unsqueeze(-1)
            whole = whole.masked_fill(behind, end_of_text.token_ids[0])
        fallback = None
        if has_fallback:
            fallback = self.fallback[:, prompt_length : prompt_length + size]
            fallback = fallback & (committed_at >= 0)
            fallback &= torch.arange(size, device=device) < length.unsqueeze(-1)
        trace = Trace(
            committed_at=committed_at,
            confidence=confidence,
            nfe=torch.tensor(self.nfe, device=device),
            length=length,
            ahead=torch.tensor(self.ahead, device=device),
            fallback=fallback,
        )
        return Decoded(whole, trace)
