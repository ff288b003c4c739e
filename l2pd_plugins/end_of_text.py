"""End-of-text prediction (EoTP, arXiv 2509.25188, section 3.3): where a sequence has ended.

Once an end-of-text token is committed, everything behind it is end-of-text: those positions leave
the canvas and cost no more compute. Positions before it that are still masked go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from l2pd_plugins.errors import L2PDError

EndOfTextRule = Literal["block", "off"]
RULES: tuple[EndOfTextRule, ...] = ("block", "off")


@dataclass(frozen=True)
class EndOfText:
    """The rule in force and the tokens that end a text."""

    rule: EndOfTextRule
    """"block": a committed end-of-text token ends the row (the paper's rule).
    "off": such a token is a token like any other, and the whole canvas is decoded."""
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
    """bool, of the shape of tokens: which are one of the end-of-text tokens."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for token_id in token_ids:
        found |= tokens == token_id
    return found


def behind_end(tokens: Tensor, token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where each row has ended: ``(ended (B,) bool, behind (B, L) bool)``.

    `behind` marks the positions behind the first end-of-text token of `tokens` (B, L). Masked
    positions hold the mask token and so count as no end.
    """
    ends = is_end_of_text(tokens, token_ids)
    seen = ends.cumsum(-1) - ends.to(torch.int64)
    return ends.any(-1), seen > 0
