"""End-of-text prediction (EoTP, arXiv 2509.25188): where a sequence has ended.

Once an end-of-text token is committed, everything behind it is end-of-text: those positions leave
the canvas and cost no more compute. Positions before it that are still masked go on. The authors'
code has a second, aggressive rule, which does not wait for the commit; it is here by its own name,
as their loops with a cache have it, which see one block.
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
    "predicted": where none is committed yet, a masked position of the block that merely predicts
    one ends the row too, the most confident of several; it stays masked itself and may still become
    another token. This is the second rule of the authors' code with a cache. Without one theirs
    looks at every masked position of the canvas, and cuts at an end of text that a later block
    predicts; that was worse (31 of 40 answers valid against 40), and is not here.
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


def behind_end(
    tokens: Tensor, masked: Tensor, x0: Tensor, confidence: Tensor, end_of_text: EndOfText
) -> tuple[Tensor, Tensor]:
    """Where each row has ended: ``(ended (B,) bool, behind (B, L) bool)``.

    All arguments (B, L), as they stand after the step's commits; a position that is not to count
    as an end of text holds another token and is not masked. `behind` marks the positions behind the
    end.
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
