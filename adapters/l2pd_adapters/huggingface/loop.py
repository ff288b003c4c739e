"""The decoding loop: forward pass, denoising step, and moving rows to their next block.

Blocks are decoded left to right, positions inside a block in any order (semi-autoregressive, LLaDA,
arXiv 2502.09992). Batch rows are independent: a row moves to its next block when its block is full,
and leaves the batch when its text has ended, so no row waits for another.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import chain, compress, count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l2pd_adapters.huggingface.forward import CanvasView, forward_for
from l2pd_adapters.huggingface.history import BlockHistory, Decoded, History
from l2pd_adapters.huggingface.references import given_references
from l2pd_adapters.huggingface.rows import LaterColumns, Row, RowTensors
from l2pd_adapters.huggingface.settings import DecodeSettings, Observers
from l2pd_adapters.huggingface.stream import TextStream
from l2pd_plugins import RemaskingPolicy, create_policy
from l2pd_plugins.block_layout import BlockLayout
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import StepOutcome, denoising_step
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.upload import upload

logger = logging.getLogger(__name__)


@torch.no_grad()
def decode(
    model: Any, input_ids: Tensor, attention_mask: Tensor, settings: DecodeSettings
) -> Decoded:
    """Decode a batch: input_ids (B, P), attention_mask (B, P) with zeros on the left only."""
    reference, reference_nfe = _references(model, input_ids, attention_mask, settings)
    running = _Decode(model, input_ids, attention_mask, settings, reference)
    try:
        while running.rows:
            running.forward_and_step()
    finally:  # a reader of the stream must not wait forever if a policy raises
        running.stream.end()
    decoded = running.history.result(
        input_ids.shape[1],
        settings.canvas.max_new_tokens,
        settings.canvas.end_of_text,
        has_fallback=running.has_fallback,
    )
    return replace(decoded, reference_nfe=reference_nfe)


class _RowReport(NamedTuple):
    """The state of a row's block after a step, on the host."""

    masked: list[bool]
    needed: list[bool]
    """Positions whose logits the next step reads."""
    ended: bool
    """Whether the text has an end."""
    visible: int
    """Number of present positions: up to and including the end of text, if there is one."""


class _Decode:
    """A batch that is being decoded. The host knows the block of each row. It reads the result of a
    step once per step, or not at all if the result is known beforehand.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        settings: DecodeSettings,
        reference: Tensor | None,
    ) -> None:
        prompt = input_ids.shape[1]
        family = settings.model.family
        self.settings, self.device = settings, input_ids.device
        self.may_undo = settings.canvas.end_of_text.rule != "off" or any(
            isinstance(policy, RemaskingPolicy) for policy in settings.policies
        )
        """Whether a step may remask tokens that an earlier step committed."""
        self.forward = forward_for(model, family, settings.model.cache)
        self.forwards = 0
        """Number of forward passes so far."""
        self.rows = [
            Row(
                sequence,
                BlockLayout.of(
                    family.attention,
                    prompt,
                    settings.canvas.max_new_tokens,
                    settings.canvas.block_length,
                    prompt_length=seen,
                ),
                first=prompt - seen,
            )
            for sequence, seen in enumerate(attention_mask.sum(-1).tolist())
        ]
        self.tensors = tensors = RowTensors.of(
            input_ids, attention_mask, self.rows, settings.model.mask_token_id
        )
        self.reference = None
        """(B, W) int64: the reference, in the columns of the tokens."""
        if reference is not None:
            self.reference = torch.full_like(tensors.tokens, settings.canvas.filler)
            self.reference[:, prompt:] = reference[:, : tensors.tokens.shape[1] - prompt]
        everything = slice(None)
        self.block = BlockBatch.start(
            tensors.tokens.gather(1, tensors.columns),
            settings.policies,
            mask_token_id=settings.model.mask_token_id,
            canvas_length=tensors.ends.squeeze(-1) - tensors.columns[:, 0],
            present=tensors.present(tensors.columns, everything),
            reference=self._reference_at(everything, tensors.columns),
            generators=None
            if settings.seeds is None
            else [torch.Generator(self.device).manual_seed(seed) for seed in settings.seeds],
            sampling=settings.sampling,
            observe=settings.observers.statistics,
        )
        self.block_history = BlockHistory.start(tensors.columns)
        self.history = History(tensors.tokens)
        self.has_fallback = False
        """Whether a policy has told in which rows its fallback decides."""
        self.later: LaterColumns | None = None
        """Columns of the later blocks at which policies look ahead."""
        if settings.model.looks_ahead:
            self._look_ahead()
        self.stream = TextStream(settings.observers.streamer, settings.canvas.max_new_tokens)
        self.stream.prompt(input_ids)

    def forward_and_step(self) -> None:
        """One forward pass and one denoising step; then move, shorten or drop rows."""
        logits, positions, places, later = self._logits()
        settings = self.settings
        outcome = denoising_step(
            self.block,
            logits,
            positions,
            end_of_text=settings.canvas.end_of_text,
            suppress_mask=settings.model.suppress_mask,
            later=later,
            places=places,
        )
        self.tensors.tokens.scatter_(1, self.tensors.columns, self.block.tokens)
        fallback = self.block.fallback
        self.has_fallback |= fallback is not None
        self.block_history.record(
            outcome, self.forwards - 1, may_undo=self.may_undo, fallback=fallback
        )
        if settings.observers.on_step is not None:
            sequences, blocks = [row.sequence for row in self.rows], [r.block for r in self.rows]
            settings.observers.on_step(sequences, blocks, outcome)
        self.stream.draft(self.rows[0], self.block, outcome)
        self._follow_up(self._learn(outcome))

    def _look_ahead(self) -> None:
        """Create the states of the later blocks for the policies that look ahead."""
        looking = self.block.looking_ahead
        behind = [self.rows[at].layout.blocks - 1 for at in looking]
        owners = [at for at, blocks in zip(looking, behind, strict=True) for _ in range(blocks)]
        if not owners:
            return
        index = upload(owners, self.device)
        distance = upload([1 + each for blocks in behind for each in range(blocks)], self.device)
        columns = self.tensors.columns[index]
        columns = columns + self.settings.canvas.block_length * distance.unsqueeze(-1)
        self.block.look_ahead(
            owners,
            self.tensors.tokens[index.unsqueeze(-1), columns],
            present=self.tensors.present(columns, index),
            reference=self._reference_at(index, columns),
        )
        self._place_later()

    def _place_later(self) -> None:
        """Update the columns of the later blocks, after a row has moved, ended or left."""
        owners = self.block.later_rows
        self.later = LaterColumns.of(owners, self.rows, self.device) if owners else None

    def _logits(
        self,
    ) -> tuple[Tensor, Tensor, list[int] | None, tuple[Tensor, Tensor] | None]:
        """A forward pass: the needed logits (N, V) and their flat positions in (R, L), on the
        device, and on the host for sampling, -1 if not masked; and the same two tensors for the
        later blocks, if a policy looks ahead.
        """
        rows, length, later = self.rows, self.settings.canvas.block_length, self.later
        view = CanvasView(
            tokens=self.tensors.tokens,
            attention=self.tensors.attention,
            position_ids=self.tensors.position_ids,
            starts=[row.start for row in rows],
            first=[row.first for row in rows],
            last=[row.last for row in rows],
            fresh=[row.fresh for row in rows],
            block_length=length,
            blocks=1 if later is None else later.blocks,
        )
        hidden = self.forward.hidden(view)
        self.forwards += 1
        later_logits = None
        if later is not None:
            later_logits = (self.forward.logits(hidden, later.in_view), later.in_blocks)
            for row, shown in zip(rows, later.counts, strict=True):
                row.ahead += shown
            hidden = hidden[:, :length]
        needed = list(compress(count(), chain.from_iterable(row.needed for row in rows)))
        places = None
        if self.settings.sampling is not None:
            masked = list(chain.from_iterable(row.masked for row in rows))
            places = [place if masked[place] else -1 for place in needed]
        positions = upload(needed, self.device)
        return self.forward.logits(hidden, positions), positions, places, later_logits

    def _learn(self, outcome: StepOutcome) -> list[_RowReport]:
        """The state of each row after the step."""
        length, block = self.settings.canvas.block_length, self.block
        if self.settings.canvas.end_of_text.rule == "off":  # no position is removed from the canvas
            visible = [sum(row.present) for row in self.rows]
            if self.settings.model.suppress_mask and all(sum(row.masked) == 1 for row in self.rows):
                # A step commits at least one mask, so the last one is gone and nothing has to be
                # read. (If the mask token can be predicted, a step may commit none.)
                nothing = [False] * length
                return [_RowReport(nothing, nothing, False, seen) for seen in visible]
            if not block.reads_committed:
                left = block.masked.tolist()  # the one host read of the step
                return [
                    _RowReport(masked, masked, False, seen)
                    for masked, seen in zip(left, visible, strict=True)
                ]
        present = block.present.sum(-1, keepdim=True)
        report = torch.cat([block.masked, block.needed(), outcome.ended[:, None], present], dim=-1)
        return [
            _RowReport(
                list(map(bool, row[:length])),
                list(map(bool, row[length:-2])),
                bool(row[-2]),
                row[-1],
            )
            for row in report.tolist()  # the one host read of the step
        ]

    def _follow_up(self, reports: list[_RowReport]) -> None:
        """Move rows with a full block to their next block or drop them; shorten ended texts."""
        advancing: list[int] = []
        leaving: list[int] = []
        ending: list[int] = []
        for at, (row, report) in enumerate(zip(self.rows, reports, strict=True)):
            row.masked, row.needed, row.fresh = report.masked, report.needed, False
            if report.ended:
                if not row.ended:
                    ending.append(at)
                row.ended = True
                last = row.canvas_start + report.visible
                if last != row.last:
                    row.last = last
                    self.tensors.attention[at, last:] = 0
            if not any(report.masked):
                self.stream.block(row, self.tensors.tokens[at], report.visible)
                (leaving if row.is_last_block else advancing).append(at)
        if ending:
            self.block.forget_later(ending)
        if advancing or leaving:
            full = self._at(sorted(advancing + leaving))
            self.history.file_blocks(self.block_history, self.tensors, full)
        if advancing:
            self._advance(advancing)
        if leaving:
            self._leave(leaving)
        if self.later is not None and (ending or advancing or leaving):
            self._place_later()

    def _advance(self, rows: list[int]) -> None:
        """Move these rows to their next blocks."""
        at, tensors = self._at(rows), self.tensors
        columns = tensors.columns[at] + self.settings.canvas.block_length
        self.block.advance(
            rows,
            tensors.tokens[at].gather(1, columns),
            present=tensors.present(columns, at),
            reference=self._reference_at(at, columns),
        )
        tensors.columns = (
            tensors.columns.index_copy(0, at, columns) if isinstance(at, Tensor) else columns
        )
        self.block_history.restart(at)
        for row in rows:
            self.rows[row].begin_next_block()

    def _leave(self, rows: list[int]) -> None:
        """Store the answers of these rows and drop the rows."""
        gone = set(rows)
        self.history.file_answers(
            [self.rows[row] for row in rows], self.tensors, upload(rows, self.device), self.forwards
        )
        kept = [row for row in range(len(self.rows)) if row not in gone]
        self.rows = [self.rows[row] for row in kept]
        if kept:
            index = upload(kept, self.device)
            self.tensors.keep(index)
            self.block_history.keep(index)
            self.block.keep(kept)
            self.forward.keep(kept, self.device)

    def _at(self, rows: list[int]) -> Tensor | slice:
        """An index of these live rows, given in ascending order."""
        return slice(None) if len(rows) == len(self.rows) else upload(rows, self.device)

    def _reference_at(self, at: Tensor | slice, columns: Tensor) -> Tensor | None:
        """The reference at columns (N, L) of the live rows `at`."""
        if self.reference is None:
            return None
        return self.reference[self.tensors.sequences[at].unsqueeze(-1), columns]


def _references(
    model: Any, input_ids: Tensor, attention_mask: Tensor, settings: DecodeSettings
) -> tuple[Tensor | None, Tensor | None]:
    """The references for policies that require them, as in `given_references`. Missing ones are
    decoded at one token per step; also returns the NFE (B,) of these decodes.
    """
    reference, missing = given_references(settings, input_ids.device)
    if reference is None or not missing:
        return reference, None
    if settings.sampling is not None:
        raise L2PDError(
            "a reference decode at one token per step is greedy: with do_sample=True, give the "
            "policy its reference"
        )
    logger.warning(
        "%d sequence(s) have no reference: decoding them first at one token per step", len(missing)
    )
    slow = create_policy("fixed_schedule", tokens_per_step=1)
    at = torch.tensor(missing, device=input_ids.device)
    first = replace(
        settings,
        policies=(slow,) * len(missing),
        seeds=None,
        observers=Observers(),
    )
    made = decode(model, input_ids[at], attention_mask[at], first)
    reference[at, : made.whole.shape[1]] = made.whole
    nfe = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)
    nfe[at] = made.trace.nfe
    return reference, nfe
