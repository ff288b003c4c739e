"""End-of-text prediction (EoTP, arXiv 2509.25188): at which position a sequence ends.

Once an end-of-text token is committed, all positions after it are end-of-text: they are removed
from the canvas and cost no more compute. Masked positions before it are still decoded. The authors'
code has a second, more aggressive rule, which does not wait for the commit. It is implemented here
as "predicted", in the form of their loops with a cache, which see one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.selection import top_1

EndOfTextRule = Literal["block", "predicted", "off"]
RULES: tuple[EndOfTextRule, ...] = ("block", "predicted", "off")


@dataclass(frozen=True)
class EndOfText:
    """The rule in force and the tokens that end a text."""

    rule: EndOfTextRule
    """"block": a committed end-of-text token ends the row (the paper's rule).
    "predicted": if no end-of-text token is committed yet, a masked position of the block that
    predicts one also ends the row (the most confident of several). This position stays masked and
    may still become another token. This is the second rule of the authors' code with a cache. Their
    code without a cache considers every masked position of the canvas, and cuts at an end of text
    that a later block predicts; that was worse (31 of 40 answers valid, against 40 of 40) and is
    not implemented. "off": end-of-text tokens have no special meaning, and the whole canvas is
    decoded."""
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise L2PDError(f"end_of_text={self.rule!r}: the rules are {', '.join(RULES)}")
        if self.rule != "off" and not self.token_ids:
            raise L2PDError(
                f"end_of_text={self.rule!r} needs an end-of-text token: the model's "
                'generation_config names no eos_token_id; pass one, or end_of_text="off"'
            )


def is_end_of_text(tokens: Tensor, token_ids: Sequence[int]) -> Tensor:
    """bool, of the shape of tokens: whether each is an end-of-text token."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for token_id in token_ids:
        found |= tokens == token_id
    return found


def behind_end(
    tokens: Tensor, masked: Tensor, x0: Tensor, confidence: Tensor, end_of_text: EndOfText
) -> tuple[Tensor, Tensor]:
    """Find the end of each row: ``(ended (B,) bool, behind (B, L) bool)``.

    All arguments are (B, L) and describe the blocks after the step's commits. To exclude a
    position, pass any other token there, and False for masked. `behind` marks the positions after
    the end.
    """
    if end_of_text.rule == "off":
        nowhere = torch.zeros_like(masked)
        return nowhere.any(-1), nowhere
    ends = is_end_of_text(tokens, end_of_text.token_ids) & ~masked
    if end_of_text.rule == "predicted":
        likely = masked & is_end_of_text(x0, end_of_text.token_ids)
        ends = ends | (top_1(confidence, likely) & ~ends.any(-1, keepdim=True))
    seen = ends.cumsum(-1) - ends.to(torch.int64)
    return ends.any(-1), seen > 0
