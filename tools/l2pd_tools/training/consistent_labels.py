"""Consistent predictions: the model itself judges answers that differ from the reference.

If many answers are valid, a prediction that differs from the reference may be as good. Here the
model itself decides this. A set of predictions is consistent if each remains likely after the surer
ones are committed; a finished answer is consistent if each of its tokens remains likely given all
others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.families import end_of_text_ids
from l2pd_adapters.huggingface.forward import CanvasView, forward_for
from l2pd_adapters.huggingface.models.model_info import family_of, mask_token_of

LIKELY = 0.1
"""Least probability of a consistent prediction, given the more confident ones."""
RIVAL = 0.5
"""Least ratio of its probability to that of the likeliest token."""
SURE = 0.95
"""Probability above which predictions are accepted together, in one forward pass."""
STANDS = 0.3
"""Least probability of each token of a consistent finished answer, given all other tokens."""

CELLS = 16384
"""Greatest number of columns, summed over the rows, of one forward pass."""


@dataclass
class States:
    """N canvases in the middle of a decode, W columns, each with a block of L positions."""

    tokens: Tensor
    """(N, W) int64, prompt and canvas."""
    attention: Tensor
    """(N, W) int64: attention mask, 1 for columns that may be attended to."""
    starts: Tensor
    """(N,) int64, first column of each block."""
    block_length: int

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Tensor) -> States:
        """The states with these indices."""
        return States(
            self.tokens[index], self.attention[index], self.starts[index], self.block_length
        )

    @property
    def columns(self) -> Tensor:
        """(N, L) int64, the columns of each block."""
        return self.starts.unsqueeze(-1) + torch.arange(
            self.block_length, device=self.starts.device
        )


@torch.no_grad()
def accepted(
    model: Any, states: States, *, masked: Tensor, x0: Tensor, confidence: Tensor
) -> Tensor:
    """The consistent predictions: (N, L) bool.

    In descending order of confidence, each prediction at a masked position is accepted if its
    probability, given those accepted before, is at least `LIKELY`, and at least `RIVAL` times that
    of the likeliest token. Predictions that have become nearly certain are accepted together.

    Args:
        masked, x0, confidence: (N, L), for each state's block, as in a `DenoisingStep`.
    """
    # If the end of the text is nearly certain, the columns after the block do not matter.
    ends = torch.tensor(end_of_text_ids(model.generation_config.eos_token_id), device=x0.device)
    in_block = states.tokens.gather(1, states.columns)
    committed = ~masked & torch.isin(in_block, ends)
    short = (committed | (torch.isin(x0, ends) & (confidence > SURE))).any(-1)
    states = States(states.tokens, states.attention.clone(), states.starts, states.block_length)
    behind = torch.arange(states.tokens.shape[1], device=x0.device) >= (
        states.starts + states.block_length
    ).unsqueeze(-1)
    states.attention[short.unsqueeze(-1) & behind] = 0
    taken = torch.zeros_like(masked)
    for index in _chunks(states.attention):
        taken[index] = _accepted(
            model, states.take(index), masked[index], x0[index], confidence[index]
        )
    return taken


def _accepted(model: Any, states: States, masked: Tensor, x0: Tensor, confidence: Tensor) -> Tensor:
    result = torch.zeros_like(masked)
    rows = torch.arange(len(states), device=masked.device)
    taken, left = torch.zeros_like(masked), masked
    probability = likeliest = confidence
    while len(rows):
        left = left & (probability >= LIKELY) & (probability >= RIVAL * likeliest)
        surest = torch.where(left, confidence, -1.0).argmax(-1, keepdim=True)
        now = (left & (probability >= SURE)).scatter(-1, surest, left.gather(-1, surest))
        taken, left = taken | now, left & ~now
        result[rows] = taken
        live = left.any(-1).nonzero().flatten()
        tokens = states.tokens.scatter(
            1, states.columns, torch.where(taken, x0, states.tokens.gather(1, states.columns))
        )
        states = States(tokens, states.attention, states.starts, states.block_length).take(live)
        rows, taken, left, x0, confidence = (
            tensor[live] for tensor in (rows, taken, left, x0, confidence)
        )
        if len(rows):
            probability, likeliest = _probabilities(model, states, x0)
    return result


@torch.no_grad()
def answers_hold(model: Any, answers: States, spans: list[tuple[int, int]]) -> list[bool]:
    """Whether each of N finished answers is consistent.

    Args:
        answers: prompts with their answers, each with its first block.
        spans: first column of each answer, and one past its last.

    Every token is masked once, so an answer costs as many forward passes as it has tokens.
    """
    device, length = answers.tokens.device, answers.block_length
    jobs = torch.tensor(
        [(row, column) for row, span in enumerate(spans) for column in range(*span)],
        dtype=torch.int64,
        device=device,
    ).reshape(-1, 2)
    ends = torch.tensor([end for _, end in spans], dtype=torch.int64, device=device).unsqueeze(-1)
    width = torch.arange(answers.tokens.shape[1], device=device)
    visible = answers.attention.masked_fill(width >= ends, 0)
    lowest = torch.ones(len(spans), device=device)
    for index in _chunks(visible[jobs[:, 0]]):
        rows, columns = jobs[index].unbind(-1)
        column = columns.unsqueeze(-1)
        one_masked = answers.tokens[rows].scatter(1, column, mask_token_of(model))
        within = (columns - answers.starts[rows]) % length
        states = States(one_masked, visible[rows], columns - within, length)
        found = _log_probabilities(model, states, within.unsqueeze(-1)).squeeze(1)
        probability = found.gather(-1, answers.tokens[rows].gather(1, column)).squeeze(-1).exp()
        lowest.scatter_reduce_(0, rows, probability, "amin")
    return (lowest >= STANDS).tolist()


@torch.no_grad()
def predictions(model: Any, states: States) -> tuple[Tensor, Tensor]:
    """The likeliest tokens (N, L) of the blocks, and their probabilities."""
    x0 = torch.zeros_like(states.columns)
    confidence = torch.zeros(x0.shape, device=x0.device)
    for index in _chunks(states.attention):
        best = _log_probabilities(model, states.take(index)).max(-1)
        confidence[index], x0[index] = best.values.exp(), best.indices
    return x0, confidence


def _probabilities(model: Any, states: States, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (N, L) of `tokens` in the blocks, and those of the likeliest tokens."""
    found = _log_probabilities(model, states)
    of_tokens = found.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return of_tokens.exp(), found.amax(-1).exp()


def _log_probabilities(model: Any, states: States, within: Tensor | None = None) -> Tensor:
    """(N, K, V) float32 log-probabilities at the positions `within` (N, K) of the blocks, None for
    all L of them; the mask token is excluded.
    """
    seen = states.attention != 0
    columns = torch.arange(seen.shape[1], device=seen.device)
    forward = forward_for(model, family_of(model), "none")
    view = CanvasView(
        tokens=states.tokens,
        attention=states.attention,
        position_ids=(states.attention.cumsum(-1) - 1).clamp(min=0),
        starts=states.starts.tolist(),
        first=seen.int().argmax(-1).tolist(),
        last=((columns * seen).amax(-1) + 1).tolist(),
        fresh=[True] * len(states),
        block_length=states.block_length,
    )
    if within is None:
        every = torch.arange(states.block_length, device=seen.device)
        within = every.expand(len(states), -1)
    rows = torch.arange(len(states), device=seen.device).unsqueeze(-1)
    at = rows * states.block_length + within
    logits = forward.logits(forward.hidden(view), at.flatten()).float()
    logits[:, mask_token_of(model)] = -torch.inf
    return logits.log_softmax(-1).view(*at.shape, -1)


def _chunks(attention: Tensor) -> Iterator[Tensor]:
    """Indices of the rows of each pass; rows that end at about the same column share one."""
    columns = torch.arange(attention.shape[1], device=attention.device)
    last = ((columns * (attention != 0)).amax(-1) + 1).cpu()
    order = last.argsort(stable=True)
    start = 0
    while start < len(order):
        size = max(1, CELLS // int(last[order[start]]))
        while size > 1 and int(last[order[min(start + size, len(order)) - 1]]) * size > CELLS:
            size -= 1
        yield order[start : start + size].to(attention.device)
        start += size
