"""The loop: forward pass, denoising step, and the bookkeeping of rows that advance and leave.

Blocks are decoded left to right, positions inside a block in any order (semi-autoregressive, LLaDA,
arXiv 2502.09992). Every row goes at its own pace: it moves to its next block when its own is full,
and leaves the batch when its text has ended, so no row waits for another.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from itertools import chain, compress, count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2pd_adapters.huggingface.forward import CanvasView, forward_for
from l2pd_adapters.huggingface.settings import DecodeSettings
from l2pd_plugins import RemaskingPolicy, UnmaskPolicy, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import StepOutcome, denoising_step
from l2pd_plugins.end_of_text import is_end_of_text
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.sampling import sample_tokens
from l2pd_plugins.trace import Trace
from l2pd_plugins.transfer import upload

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoded:
    """Answers of B sequences, the canvas of G positions behind the prompt."""

    whole: Tensor
    """(B, G' >= G) int64; behind an end of text, the end-of-text token. Behind the canvas is the
    rest of the last block, which a block-causal model decodes with it."""
    trace: Trace
    reference_nfe: Tensor | None = None
    """(B,) int64, forward passes of reference decodes that were made first."""

    @property
    def tokens(self) -> Tensor:
        """(B, G) int64, the canvas alone."""
        return self.whole[:, : self.trace.committed_at.shape[1]]


@torch.no_grad()
def decode(
    model: Any, input_ids: Tensor, attention_mask: Tensor, settings: DecodeSettings
) -> Decoded:
    """Decode a batch: input_ids (B, P), attention_mask (B, P) with zeros on the left only."""
    reference, reference_nfe = _references(model, input_ids, attention_mask, settings)
    canvas = _Canvas(model, input_ids, attention_mask, settings, reference)
    try:
        while canvas.rows:
            canvas.forward_and_step()
    finally:  # a reader of the stream must not wait for ever, whatever a policy does
        if settings.streamer is not None:
            settings.streamer.end()
    return Decoded(*canvas.result(), reference_nfe)


@dataclass(frozen=True)
class _LaterPlaces:
    """Where the N later blocks of R rows lie: M positions."""

    blocks: int
    """Of how many blocks the hidden states are wanted, the row's own included."""
    in_view: Tensor
    """(M,) int64, places in hidden states (R, blocks * L)."""
    in_blocks: Tensor
    """(M,) int64, the same places in (N, L)."""
    counts: list[int]
    """Positions of each of the R rows."""

    @classmethod
    def of(
        cls,
        owners: list[int],
        starts: list[int],
        ends: list[int],
        length: int,
        device: torch.device,
    ) -> _LaterPlaces:
        """owners: the row of each later block, the nearest first; starts and ends: columns at which
        each row's present block begins and its canvas ends."""
        distance: list[int] = []
        behind = [0] * len(starts)
        for row in owners:
            behind[row] += 1
            distance.append(behind[row])
        blocks = 1 + max(behind)
        rows, nth = np.array(owners), np.array(distance)
        offset = nth[:, None] * length + np.arange(length)
        room = np.array(ends)[rows] - np.array(starts)[rows]
        inside = (offset < room[:, None]).ravel()
        in_view = (rows[:, None] * blocks * length + offset).ravel()[inside]
        in_blocks = np.flatnonzero(inside)
        counts = np.bincount(rows[in_blocks // length], minlength=len(starts))
        return cls(blocks, upload(in_view, device), upload(in_blocks, device), counts.tolist())


_PER_ROW = (
    "rows",
    "origins",
    "ends",
    "blocks",
    "fresh",
    "ended",
    "first",
    "last",
    "masked",
    "needed",
)
_PER_ROW_ON_DEVICE = (
    "tokens",
    "attention",
    "position_ids",
    "sequences",
    "origin",
    "columns",
    "block_committed_at",
    "block_confidence",
    "block_broken",
)


class _Canvas:
    """Prompts and canvases of the rows that are still being decoded.

    Which row stands where is kept on the host; the host learns what a step did by one read per
    step, and by none where that is known beforehand. Tensors are (R, W) for the R live rows. A
    row's blocks are counted from its origin: the end of the prompt, or, in a block-causal model,
    the border of the block that the prompt has begun. Such a model sees whole blocks and never
    less, so its canvas ends with its last block; otherwise it ends after max_new_tokens. W counts
    whole blocks.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        settings: DecodeSettings,
        reference: Tensor | None,
    ) -> None:
        batch, prompt = input_ids.shape
        device = input_ids.device
        length = settings.block_length
        self.settings, self.device = settings, device
        self.may_undo = settings.end_of_text.rule != "off" or any(
            isinstance(policy, RemaskingPolicy) for policy in settings.policies
        )
        """Whether a step may take back what an earlier one committed."""
        block_causal = settings.family.attention == "block_causal"
        self.forward = forward_for(model, settings.family, settings.cache)
        self.prompt_length = prompt
        self.origins = [
            prompt - settings.family.prompt_in_block(seen, length)
            for seen in attention_mask.sum(-1).tolist()
        ]
        """Column at which each live row's first block starts."""
        end = prompt + settings.max_new_tokens
        whole = [origin - (origin - end) // length * length for origin in self.origins]
        self.ends = whole if block_causal else [end] * batch
        """One past the last column of each live row's canvas."""
        width = max(whole)

        self.sequences = torch.arange(batch, device=device)
        """(R,) `rows` on the device."""
        self.tokens = torch.full((batch, width), settings.mask_token_id, device=device)
        self.tokens[:, :prompt] = input_ids
        self.attention = torch.ones(batch, width, dtype=torch.int64, device=device)
        self.attention[:, :prompt] = attention_mask
        self.position_ids = (self.attention.cumsum(-1) - 1).clamp(min=0)
        self.origin = torch.tensor(self.origins, device=device).unsqueeze(-1)
        """(R, 1), `origins` on the device."""
        self.reference = None
        if reference is not None:  # laid out like the tokens
            self.reference = torch.full_like(self.tokens, settings.filler)
            self.reference[:, prompt:] = reference[:, : width - prompt]

        self.rows = list(range(batch))
        """Sequence (index into the batch) of each live row."""
        self.blocks = [0] * batch
        """Block that each live row stands in."""
        self.fresh = [True] * batch
        """Whether each live row is at the first step of its block."""
        self.ended = [False] * batch
        """Whether each live row's text has an end: no block follows the one it stands in."""
        self.first = (prompt - attention_mask.sum(-1)).tolist()
        """First column that each live row sees."""
        self.last = list(self.ends)
        """One past the last column that each live row sees."""

        # What has become of each sequence.
        self.answers = self.tokens.clone()
        self.committed_at = torch.full_like(self.tokens, -1)
        self.confidence = torch.zeros_like(self.tokens, dtype=torch.float32)
        self.broken = torch.zeros(batch, dtype=torch.bool, device=device)
        """Which sequences have met logits that are no numbers."""
        self.nfe = [0] * batch
        self.length = [settings.max_new_tokens] * batch
        """Tokens of each answer, up to and including the end of text."""
        self.forwards = 0

        self.columns = columns = self.origin + torch.arange(length, device=device)
        """(R, L), of each live row's block."""
        canvas_length = torch.tensor(self.ends, device=device) - self.origin.squeeze(-1)
        self.block = BlockBatch.start(
            self.tokens.gather(1, columns),
            settings.policies,
            mask_token_id=settings.mask_token_id,
            canvas_length=canvas_length,
            present=self._present(columns, self.origin + canvas_length.unsqueeze(-1)),
            reference=None if self.reference is None else self.reference.gather(1, columns),
            generators=None
            if settings.seeds is None
            else [torch.Generator(device).manual_seed(seed) for seed in settings.seeds],
            observe=settings.observe,
        )
        # The block of each live row in `committed_at`, `confidence` and `broken`, until it is full.
        self.block_committed_at = torch.full_like(columns, -1)
        self.block_confidence = torch.zeros_like(columns, dtype=torch.float32)
        self.block_broken = torch.zeros_like(self.block.masked)
        self.masked = self.block.masked.tolist()
        """Which positions of each live row's block are masked; a host copy."""
        self.needed = list(self.masked)
        """Positions of each live row's block whose logits the next step reads; a host copy."""
        self.ahead = [0] * batch
        """Positions of later blocks that each sequence's policy was shown."""
        self._later_places: _LaterPlaces | None = None
        if settings.looks_ahead:
            self._look_ahead()
        if settings.streamer is not None:
            settings.streamer.put(input_ids[0].cpu())

    def forward_and_step(self) -> None:
        """One forward pass, one denoising step, and what follows from it."""
        logits, positions, later = self._logits()
        settings = self.settings
        outcome = denoising_step(
            self.block,
            logits,
            positions,
            end_of_text=settings.end_of_text,
            x0=self._draw(logits, positions) if settings.do_sample else None,
            suppress_mask=settings.suppress_mask,
            later=later,
        )
        self._record(outcome)
        if settings.on_step is not None:
            settings.on_step(list(self.rows), list(self.blocks), outcome)
        self._stream_draft(outcome)
        self._follow_up(outcome)

    def result(self) -> tuple[Tensor, Trace]:
        """`Decoded.whole` and `trace`, once no row is live."""
        size = self.settings.max_new_tokens
        broken = self.broken.nonzero().flatten().tolist()
        if broken:
            logger.warning(
                "the model's logits hold NaN, or nothing but -inf, in sequence(s) %s: such "
                "predictions are the last to be taken, and mean nothing",
                ", ".join(map(str, broken)),
            )
        whole = self.answers[:, self.prompt_length :]
        committed_at, confidence = (
            history[:, self.prompt_length : self.prompt_length + size]
            for history in (self.committed_at, self.confidence)
        )
        end_of_text = self.settings.end_of_text
        length = torch.tensor(self.length, device=self.device)
        if end_of_text.rule == "off":
            ends = is_end_of_text(whole[:, :size], end_of_text.token_ids)
            length = torch.where(ends.any(-1), ends.to(torch.int64).argmax(-1) + 1, size)
        else:
            behind = torch.arange(whole.shape[1], device=self.device) >= length.unsqueeze(-1)
            behind &= (length < size).unsqueeze(-1)
            whole = whole.masked_fill(behind, end_of_text.token_ids[0])
        return whole, Trace(
            committed_at=committed_at,
            confidence=confidence,
            nfe=torch.tensor(self.nfe, device=self.device),
            length=length,
            ahead=torch.tensor(self.ahead, device=self.device),
        )

    def _look_ahead(self) -> None:
        """Begin to keep what the policies that look ahead remember of the later blocks."""
        length = self.settings.block_length
        rows = self.block.looking_ahead
        behind = [-(-(self.ends[row] - self.origins[row]) // length) - 1 for row in rows]
        owners = [row for row, count in zip(rows, behind, strict=True) for _ in range(count)]
        if not owners:
            return
        index = upload(owners, self.device)
        distance = [1 + each for count in behind for each in range(count)]
        origin = self.origin[index]
        columns = self.columns[index] + length * upload(distance, self.device).unsqueeze(-1)
        at = (index.unsqueeze(-1), columns)
        self.block.look_ahead(
            owners,
            self.tokens[at],
            present=self._present(columns, origin + self.block.canvas_length[index].unsqueeze(-1)),
            reference=None if self.reference is None else self.reference[at],
        )
        self._place_later()

    def _place_later(self) -> None:
        """Say anew where the later blocks lie, since a row has moved, ended or left."""
        owners = self.block.later_rows
        self._later_places = None
        if owners:
            starts = [self._start(row) for row in range(len(self.rows))]
            self._later_places = _LaterPlaces.of(
                owners, starts, self.ends, self.settings.block_length, self.device
            )

    def _logits(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """A forward pass: the needed logits (N, V), and where in (R, L) they belong; and the same
        of the later blocks, where a policy looks ahead."""
        length = self.settings.block_length
        places = self._later_places
        view = CanvasView(
            tokens=self.tokens,
            attention=self.attention,
            position_ids=self.position_ids,
            starts=[self._start(row) for row in range(len(self.rows))],
            first=self.first,
            last=self.last,
            fresh=self.fresh,
            block_length=length,
            blocks=1 if places is None else places.blocks,
        )
        hidden = self.forward.hidden(view)
        self.forwards += 1
        later = None
        if places is not None:
            later = (self.forward.logits(hidden, places.in_view), places.in_blocks)
            for sequence, count in zip(self.rows, places.counts, strict=True):
                self.ahead[sequence] += count
            hidden = hidden[:, :length]
        needed = compress(range(len(self.needed) * length), chain.from_iterable(self.needed))
        positions = upload(list(needed), self.device)
        return self.forward.logits(hidden, positions), positions, later

    def _draw(self, logits: Tensor, positions: Tensor) -> Tensor:
        """(N,) tokens drawn for the masked positions; -1, the argmax, for committed ones.

        Committed positions draw nothing, so a sequence's random stream depends on its decode alone
        and not on what is asked for beside it.
        """
        settings = self.settings
        assert self.block.generators is not None
        masked = list(compress(chain(*self.masked), chain(*self.needed)))
        index = None if all(masked) else upload(list(compress(count(), masked)), self.device)
        drawn = sample_tokens(
            logits if index is None else logits.index_select(0, index),
            [sum(row) for row in self.masked],
            [generator for generator in self.block.generators if generator is not None],
            warp=settings.warp,
            suppress=settings.mask_token_id if settings.suppress_mask else None,
        )
        if index is None:
            return drawn
        return torch.full_like(positions, -1).index_copy(0, index, drawn)

    def _record(self, outcome: StepOutcome) -> None:
        """Write the block into the canvas, and the commits into the block's history."""
        self.tokens.scatter_(1, self.columns, self.block.tokens)
        committed, step = outcome.committed, outcome.step
        at = torch.where(committed, self.forwards - 1, self.block_committed_at)
        confidence = torch.where(committed, step.confidence, self.block_confidence)
        if self.may_undo:
            undone = outcome.remasked | outcome.behind
            at, confidence = at.masked_fill(undone, -1), confidence.masked_fill(undone, 0.0)
        self.block_committed_at, self.block_confidence = at, confidence
        self.block_broken = self.block_broken | (step.masked ^ outcome.sound)

    def _file(self, rows: list[int]) -> None:
        """Write the history of these rows' blocks, which are full, into that of their sequences."""
        at = self._at(rows)
        sequences = self.sequences[at]
        where = (sequences.unsqueeze(-1), self.columns[at])
        self.committed_at[where] = self.block_committed_at[at]
        self.confidence[where] = self.block_confidence[at]
        self.broken[sequences] |= self.block_broken[at].any(-1)

    def _at(self, rows: list[int]) -> Tensor | slice:
        """An index of these live rows, which are in order."""
        return slice(None) if len(rows) == len(self.rows) else upload(rows, self.device)

    def _follow_up(self, outcome: StepOutcome) -> None:
        """Rows whose block is full go on to the next one or leave; ended texts are cut."""
        advancing: list[int] = []
        leaving: list[int] = []
        ending: list[int] = []
        for row, (masked, needed, ended, seen) in enumerate(self._learn(outcome)):
            self.masked[row], self.needed[row] = masked, needed
            self.fresh[row] = False
            if ended:
                if not self.ended[row]:
                    ending.append(row)
                self.ended[row] = True
                last = self._begin(row) + seen
                if last != self.last[row]:
                    self.last[row] = last
                    self.attention[row, last:] = 0
            if any(masked):
                continue
            self._stream_block(row, seen)
            self.blocks[row] += 1
            if self.ended[row] or self._start(row) >= self.ends[row]:
                leaving.append(row)
            else:
                advancing.append(row)
        if ending:
            self.block.forget_later(ending)
        if advancing or leaving:
            self._file(sorted(advancing + leaving))
        if advancing:
            self._advance(advancing)
        if leaving:
            self._leave(leaving)
        if self._later_places is not None and (ending or advancing or leaving):
            self._place_later()

    def _learn(self, outcome: StepOutcome) -> list[tuple[list[bool], list[bool], bool, int]]:
        """What the step has left of each row: masked and needed positions of the block, whether the
        text has ended, and how many positions of the block are present."""
        length, block = self.settings.block_length, self.block
        if self.settings.end_of_text.rule == "off":  # nothing leaves the canvas
            inside = [sum(self._inside(row)) for row in range(len(self.rows))]
            if self.settings.suppress_mask and all(sum(row) == 1 for row in self.masked):
                # A step commits at least one mask, so none is left: nothing to read. (Where the
                # mask token can be predicted it may commit none.)
                nothing = [False] * length
                return [(nothing, nothing, False, seen) for seen in inside]
            if not block.reads_committed:
                left = block.masked.tolist()  # the one host read of the step
                return [(row, row, False, seen) for row, seen in zip(left, inside, strict=True)]
        visible = block.present.sum(-1, keepdim=True)
        report = torch.cat([block.masked, block.needed(), outcome.ended[:, None], visible], dim=-1)
        return [
            ([*map(bool, row[:length])], [*map(bool, row[length:-2])], bool(row[-2]), row[-1])
            for row in report.tolist()  # the one host read of the step
        ]

    def _advance(self, rows: list[int]) -> None:
        """Move these rows to the block that `blocks` names now."""
        at = self._at(rows)
        origin, columns = self.origin[at], self.columns[at] + self.settings.block_length
        tokens, canvas_length = self.tokens[at], self.block.canvas_length[at]
        reference = None
        if self.reference is not None:
            reference = self.reference[self.sequences[at]].gather(1, columns)
        self.block.advance(
            rows,
            tokens.gather(1, columns),
            present=self._present(columns, origin + canvas_length.unsqueeze(-1)),
            reference=reference,
        )
        for name, fresh in (
            ("columns", columns),
            ("block_committed_at", torch.full_like(columns, -1)),
            ("block_confidence", torch.zeros_like(columns, dtype=torch.float32)),
            ("block_broken", torch.zeros_like(columns, dtype=torch.bool)),
        ):
            if isinstance(at, Tensor):
                fresh = getattr(self, name).index_copy(0, at, fresh)
            setattr(self, name, fresh)
        for row in rows:
            self.fresh[row] = True
            self.masked[row] = self.needed[row] = self._inside(row)

    def _leave(self, rows: list[int]) -> None:
        at = upload(rows, self.device)
        self.answers[self.sequences[at]] = self.tokens[at]
        for row in rows:
            sequence = self.rows[row]
            self.nfe[sequence] = self.forwards
            length = self.last[row] - self.prompt_length
            self.length[sequence] = min(length, self.settings.max_new_tokens)
        gone = set(rows)
        kept = [row for row in range(len(self.rows)) if row not in gone]
        for name in _PER_ROW:
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in kept])
        if kept:
            stay = upload(kept, self.device)
            for name in _PER_ROW_ON_DEVICE:
                setattr(self, name, getattr(self, name).index_select(0, stay))
            self.block.keep(kept)
            self.forward.keep(kept, self.device)

    def _start(self, row: int) -> int:
        """First column of the row's block."""
        return self.origins[row] + self.blocks[row] * self.settings.block_length

    def _begin(self, row: int) -> int:
        """First column of the canvas in the row's block, of which the prompt may hold a part."""
        return max(self.prompt_length, self._start(row))

    def _inside(self, row: int) -> list[bool]:
        """Which positions of the row's block the canvas has."""
        start, begin, end = self._start(row), self._begin(row), self.ends[row]
        return [begin <= start + i < end for i in range(self.settings.block_length)]

    def _present(self, columns: Tensor, ends: Tensor) -> Tensor:
        """bool (N, L): the columns (N, L) that belong to a canvas with these ends (N, 1)."""
        return (columns >= self.prompt_length) & (columns < ends)

    def _stream_draft(self, outcome: StepOutcome) -> None:
        streamer = self.settings.streamer
        if streamer is None or not hasattr(streamer, "put_draft"):
            return
        draft = torch.where(self.block.masked, outcome.step.x0, self.block.tokens)
        room = self.prompt_length + self.settings.max_new_tokens - self._begin(0)
        streamer.put_draft(value=draft[0][self.block.present[0]][:room].cpu())

    def _stream_block(self, row: int, visible: int) -> None:
        if self.settings.streamer is not None:
            begin = self._begin(row)
            end = min(begin + visible, self.prompt_length + self.settings.max_new_tokens)
            self.settings.streamer.put(self.tokens[row, begin:end].cpu())


def _references(
    model: Any, input_ids: Tensor, attention_mask: Tensor, settings: DecodeSettings
) -> tuple[Tensor | None, Tensor | None]:
    """What policies that require "reference" are shown: (B, max_new_tokens + block_length) tokens,
    and the NFE that making them cost. Behind a reference that is given is the end of text."""
    wanting: dict[int, list[int]] = {}
    for row, policy in enumerate(settings.policies):
        if "reference" in policy.requires:
            wanting.setdefault(id(policy), []).append(row)
    if not wanting:
        return None, None
    batch, size = len(input_ids), settings.max_new_tokens
    shape = (batch, size + settings.block_length)  # the last block may reach over the canvas
    reference = torch.full(shape, settings.filler, device=input_ids.device)
    missing: list[int] = []
    for rows in wanting.values():
        policy = settings.policies[rows[0]]
        given = policy.reference
        if given is None:
            missing += rows
        else:
            _fill_given(reference, rows, given, policy, settings)
    if not missing:
        return reference, None
    if settings.do_sample:
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
        streamer=None,
        on_step=None,
        seeds=None,
        observe=frozenset(),
    )
    made = decode(model, input_ids[at], attention_mask[at], first)
    reference[at, : made.whole.shape[1]] = made.whole
    nfe = torch.zeros(batch, dtype=torch.int64, device=input_ids.device)
    nfe[at] = made.trace.nfe
    return reference, nfe


def _fill_given(
    reference: Tensor,
    rows: list[int],
    given: Any,
    policy: UnmaskPolicy,
    settings: DecodeSettings,
) -> None:
    """Lay out the reference that a policy brings: one list for all its rows, or one per row."""
    given = given.tolist() if isinstance(given, Tensor) else list(given)
    nested = bool(given) and isinstance(given[0], list | tuple)
    lists = given if nested else [given] * len(rows)
    if len(lists) != len(rows):
        raise L2PDError(f"{policy.name}: {len(lists)} references for {len(rows)} sequences")
    for row, tokens in zip(rows, lists, strict=True):
        if len(tokens) > settings.max_new_tokens:
            raise L2PDError(
                f"{policy.name}: a reference of {len(tokens)} tokens is longer than "
                f"max_new_tokens={settings.max_new_tokens}"
            )
        reference[row, : len(tokens)] = torch.tensor(list(tokens), device=reference.device)
