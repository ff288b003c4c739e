"""Forward passes over answers that are partly masked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from l2pd_adapters.huggingface.forward import CanvasView, forward_for
from l2pd_adapters.huggingface.models.model_info import block_length_of, family_of, mask_token_of
from l2pd_plugins.block_layout import BlockLayout
from l2pd_plugins.statistics import row_statistics

_ELEMENTS = 1 << 26
"""Greatest number of logits that are computed at once."""


@dataclass(frozen=True)
class Part:
    """Tokens of an answer that are scored together, after the text before them: the whole answer
    for a bidirectional model, those of one block for a block-causal model.
    """

    text: Tensor
    """(T,) int64, on the host: the prompt and the answer up to the part's end. If the answer ends
    inside a block of a block-causal model, the rest of the block is masked, as in decoding.
    """
    block: int
    """First position of the block."""
    begin: int
    """First position of the part; it is after `block` if the block begins with prompt tokens."""
    end: int
    """One past the last position of the part."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.begin


class Predictions(NamedTuple):
    """What a pass says about N masked positions, on the host; each (N,)."""

    owner: Tensor
    """int64, the row."""
    column: Tensor
    """int64, the position in its part."""
    x0: Tensor
    """int64, the predicted token."""
    confidence: Tensor
    """float32, the probability of x0."""
    log_probability: Tensor
    """float64, that of the answer's token, in nats."""


class PartialPasses:
    """The forward passes of one model, without a cache."""

    def __init__(self, model: Any) -> None:
        self.family = family_of(model)
        self.block_causal = self.family.attention == "block_causal"
        self.mask_token_id = mask_token_of(model)
        self.block_length = block_length_of(model) if self.block_causal else None
        self.vocabulary: int = model.config.vocab_size
        self.device: torch.device = model.device
        self._forward = forward_for(model, self.family, "none")

    def parts(self, prompt: Sequence[int], answer: Sequence[int]) -> list[Part]:
        """The parts of an answer, from left to right."""
        length = self.block_length or len(answer)
        layout = BlockLayout.of(self.family.attention, len(prompt), len(answer), length)
        text = torch.full((layout.whole_end,), self.mask_token_id)
        text[: len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        found = []
        for block in range(layout.blocks):
            start = layout.start_of(block)
            end = min(start + length, len(prompt) + len(answer))
            part = Part(text[: start + length], start, layout.canvas_start_of(block), end)
            found.append(part)
        return found

    def predict(self, parts: Sequence[Part], masked: Tensor, wanted: Tensor) -> Predictions:
        """One pass over R rows.

        masked: (R, L) bool, on the host: which tokens of each row's part are masked; columns after
        the part's end are False. wanted: (R, L) bool: which of them to predict.
        """
        view = self._view(parts, masked)
        hidden = self._forward.hidden(view)
        owner, column = wanted.nonzero(as_tuple=True)
        offsets = torch.tensor([part.begin - part.block for part in parts])
        indices = owner * view.wanted + offsets[owner] + column
        begins = torch.tensor([part.begin for part in parts])
        texts = padded([part.text for part in parts])
        truth = texts[owner, begins[owner] + column]
        x0, confidence, own = zip(*self._statistics(hidden, indices, truth), strict=True)
        return Predictions(
            owner,
            column,
            torch.cat(x0).cpu(),
            torch.cat(confidence).cpu(),
            torch.cat(own).cpu().double(),
        )

    def _view(self, parts: Sequence[Part], masked: Tensor) -> CanvasView:
        """The rows with their blocks at the same column."""
        start = max(part.block for part in parts)
        first = [start - part.block for part in parts]
        last = [begin + len(part.text) for begin, part in zip(first, parts, strict=True)]
        tokens = torch.full((len(parts), max(last)), self.mask_token_id)
        attention = torch.zeros_like(tokens)
        for row, part in enumerate(parts):
            inside = slice(first[row], last[row])
            tokens[row, inside] = part.text
            attention[row, inside] = 1
            scored = tokens[row, first[row] + part.begin : first[row] + part.end]
            scored[masked[row, : part.length]] = self.mask_token_id
        return CanvasView(
            tokens=tokens.to(self.device),
            attention=attention.to(self.device),
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0).to(self.device),
            starts=[start] * len(parts),
            first=first,
            last=last,
            fresh=[True] * len(parts),
            block_length=self.block_length or max(part.length for part in parts),
        )

    def _statistics(
        self, hidden: Tensor, indices: Tensor, truth: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x0, confidence and the log-probability of the true token, chunk by chunk."""
        at_once = max(1, _ELEMENTS // self.vocabulary)
        for some, tokens in zip(indices.split(at_once), truth.split(at_once), strict=True):
            logits = self._forward.logits(hidden, some.to(self.device))
            found = row_statistics(logits)
            both = torch.stack([tokens.to(logits.device), found.x0], dim=-1)
            scores = logits.gather(1, both).float()
            # The most probable token's probability is never too small for float32.
            below = scores[:, 0] - scores[:, 1]
            yield found.x0, found.confidence, below + found.confidence.log()


def padded(rows: Sequence[Tensor]) -> Tensor:
    """The rows as one tensor, with zeros after the end of each."""
    return pad_sequence(list(rows), batch_first=True)
