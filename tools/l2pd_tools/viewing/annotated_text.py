"""An answer with the step below each of its tokens."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l2pd_tools.viewing.token_text import printable

if TYPE_CHECKING:
    from rich.text import Text

LEGEND = "Below each token, read downwards: the step that committed it, counted from 1."


def annotated(
    tokenizer: Any, tokens: Sequence[int], committed_at: Sequence[int], width: int
) -> list[Text]:
    """Lines of at most `width` columns: the tokens, below them the digits of their steps.

    Colours add no information. `committed_at` counts steps from 0, as a Trace does.
    """
    from rich.cells import cell_len
    from rich.text import Text

    steps = [step + 1 for step in committed_at]
    last = max(steps, default=1)
    digits = len(str(last))
    lines: list[list[Text]] = []
    used = width
    for piece, step in zip(_pieces(tokenizer, tokens, width), steps, strict=True):
        size = cell_len(piece)
        if used + size > width:
            lines.append([Text() for _ in range(1 + digits)])
            used = 0
        used += size
        style = step_colour(step, last)
        for line, cell in zip(lines[-1], (piece, *str(step).rjust(digits)), strict=True):
            line.append(cell + " " * (size - cell_len(cell)), style)
    return [line for group in lines for line in group]


def _pieces(tokenizer: Any, tokens: Sequence[int], width: int) -> list[str]:
    """The text of each token, 1 to `width` columns wide, with control characters escaped."""
    from rich.cells import cell_len, set_cell_size

    pieces, before = [], ""
    for i in range(len(tokens)):
        # A token's text is the difference of two texts, since some tokenizers drop the space before
        # a single token.
        text = tokenizer.decode(list(tokens[: i + 1]), clean_up_tokenization_spaces=False)
        piece = text[len(before) :] if text.startswith(before) else tokenizer.decode([tokens[i]])
        before = text
        piece = printable(piece) or " "
        pieces.append(set_cell_size(piece, width) if cell_len(piece) > width else piece)
    return pieces


def step_colour(step: int, last: int) -> str:
    """A rich style, from blue for the first step (1) to yellow for the last."""
    hue = 0.6 - 0.45 * (step - 1) / max(last - 1, 1)
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.6, 0.9))
    return f"rgb({red},{green},{blue})"
