"""One denoising step of one row in plain Python, given the answers of its policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from l2pd_plugins.end_of_text import EndOfText


@dataclass
class Row:
    """The state of a block; lists of length L."""

    tokens: list[int]
    masked: list[bool]
    present: list[bool]


@dataclass
class Rules:
    """The settings that do not change from step to step."""

    mask: int
    end_of_text: EndOfText
    ignores_end: bool
    progress: str
    edits: bool


def statistics(
    logits: Tensor, suppressed: int | None, given: Sequence[int] | None
) -> list[tuple[int | None, float]]:
    """For each row of logits (L, V): the predicted token, None if any is allowed, and its
    probability, NaN if there is none. given: sampled tokens, -1 for none."""
    wide = logits.double()
    if suppressed is not None:
        wide = wide.index_fill(1, torch.tensor([suppressed]), -math.inf)
    top = wide.amax(-1)
    found: list[tuple[int | None, float]] = []
    for i, highest in enumerate(top.tolist()):
        drawn = None if given is None or given[i] < 0 else given[i]
        if not math.isfinite(highest):  # NaN, infinity, or nothing but -inf
            found.append((drawn, math.nan))
            continue
        token = int((wide[i] == highest).nonzero()[0]) if drawn is None else drawn
        found.append((token, float(wide[i].softmax(-1)[token])))
    return found


def best(score: Sequence[float], candidates: Sequence[bool]) -> int | None:
    """The first candidate with the highest score; NaN ranks below every number."""
    found = [i for i, candidate in enumerate(candidates) if candidate]
    if not found:
        return None
    return max(found, key=lambda i: (-math.inf if math.isnan(score[i]) else score[i], -i))


def take_step(
    row: Row,
    rules: Rules,
    x0: Sequence[int],
    confidence: Sequence[float],
    selected: Sequence[bool],
    taken_back: Sequence[bool] | None,
    may_stay_masked: bool,
) -> Row:
    """The row after the step. taken_back: the policy's answer to `remask`, None if it has no
    `remask`; may_stay_masked: a position with a predicted mask token stays masked."""
    length, mask = len(row.tokens), rules.mask
    ends = rules.end_of_text
    open_rule = ends.rule == "off" or rules.ignores_end
    numbers = [not math.isnan(c) for c in confidence]
    sound = [m and n for m, n in zip(row.masked, numbers, strict=True)]
    chosen = {i for i in range(length) if selected[i] and sound[i]}
    if rules.progress == "always_top1" or (rules.progress == "argmax_if_empty" and not chosen):
        one = best(confidence, row.masked)
    elif not chosen:
        one = next((i for i in range(length) if sound[i]), None)
        if one is None:
            one = next((i for i in range(length) if row.masked[i]), None)
    else:
        one = None
    chosen |= set() if one is None else {one}
    if rules.edits and any(row.masked):
        chosen |= {
            i
            for i in range(length)
            if selected[i]
            and row.present[i]
            and not row.masked[i]
            and numbers[i]
            and x0[i] != row.tokens[i]
            and (open_rule or row.tokens[i] not in ends.token_ids)
        }
    if may_stay_masked:
        chosen = {i for i in chosen if x0[i] != mask}
    tokens = [x0[i] if i in chosen else token for i, token in enumerate(row.tokens)]
    masked = [m and i not in chosen for i, m in enumerate(row.masked)]
    if taken_back is not None:
        room = max(0, sum(row.masked[i] for i in chosen) - 1)
        back = [
            i
            for i in range(length)
            if taken_back[i]
            and row.present[i]
            and not masked[i]
            and (open_rule or tokens[i] not in ends.token_ids)
        ]
        back.sort(key=lambda i: (math.isnan(confidence[i]), confidence[i], i))
        for i in back[:room]:
            tokens[i], masked[i] = mask, True
    present = list(row.present)
    if not open_rule:
        here = [
            i for i in range(length) if present[i] and not masked[i] and tokens[i] in ends.token_ids
        ]
        if not here and ends.rule == "predicted":
            likely = [m and x0[i] in ends.token_ids for i, m in enumerate(masked)]
            one = best(confidence, likely)
            here = [] if one is None else [one]
        for i in range(here[0] + 1 if here else length, length):
            if present[i]:
                tokens[i], masked[i], present[i] = ends.token_ids[0], False, False
    return Row(tokens, masked, present)


def row_of(tokens: Tensor, masked: Tensor, present: Tensor) -> Row:
    """The row of tensors (L,)."""
    return Row(tokens.tolist(), masked.tolist(), present.tolist())
