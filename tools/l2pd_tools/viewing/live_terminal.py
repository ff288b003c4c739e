"""Drawing a decode on the terminal while it runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from l2pd_adapters.families import end_of_text_ids
from l2pd_plugins import L2PDError
from l2pd_plugins.recording import Canvas, Frame
from l2pd_tools.viewing.annotated_text import step_colour
from l2pd_tools.viewing.stepped_decode import SteppedDecode
from l2pd_tools.viewing.token_text import TokenTexts, printable

if TYPE_CHECKING:
    from l2pd_tools.evaluation.prompts import Prompt
    from l2pd_tools.evaluation.results import Evaluation

MASKED = "░"
_PROMPT_LINES = 3
"""Greatest number of lines of the prompt that are shown during the decode."""


def terminal() -> Console:
    """stderr as a terminal. Raises L2PDError if it is not a terminal or cannot move its cursor."""
    console = Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal or console.is_dumb_terminal:
        raise L2PDError(
            "--watch draws on a terminal, and stderr is not an interactive one; "
            "--trace shows the steps anywhere"
        )
    return console


def watch(
    console: Console,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    pace: float,
    **settings: Any,
) -> tuple[Evaluation, float]:
    """Decode the prompts one after the other and draw every step.

    Args:
        pace: least number of seconds that each step is shown.
        settings: those of `evaluate`.

    Returns what `evaluate` returns, and the seconds that the decodes took without the drawing.
    """
    decode = SteppedDecode(model, tokenizer, prompts, batch_size=1, **settings)
    texts = TokenTexts(tokenizer)
    ends = end_of_text_ids(model.generation_config.eos_token_id)
    view: _View | None = None
    with closing(decode), Live(console=console, auto_refresh=False, transient=True) as live:
        for index, frame in decode:
            if view is None or view.index != index:
                _leave(console, view)
                canvas = Canvas(settings["max_new_tokens"])
                view = _View(index, prompts[index].text, canvas, texts, ends)
            view.take(frame)
            began = time.perf_counter()
            live.update(view.drawn(console.width, console.height), refresh=True)
            time.sleep(max(0.0, pace - (time.perf_counter() - began)))
        live.update(Text(), refresh=True)
    _leave(console, view)
    result = decode.result
    assert result is not None
    return result, result.seconds - decode.waited


def _leave(console: Console, view: _View | None) -> None:
    """Leave the complete finished decode on the screen."""
    if view is not None:
        console.print(view.drawn(console.width))
        console.print()


class _View:
    """The drawing of one prompt's decode."""

    def __init__(
        self, index: int, prompt: str, canvas: Canvas, texts: TokenTexts, ends: Sequence[int]
    ) -> None:
        self.index = index
        self._prompt = prompt
        self._canvas = canvas
        self._texts = texts
        self._ends = ends
        self._block = range(0)
        self._step = 0
        """Steps taken in the block."""

    def take(self, frame: Frame) -> None:
        """Apply the next frame."""
        self._step = self._step + 1 if frame.block.start == self._block.start else 1
        self._block = frame.block
        self._canvas.take(frame)

    def drawn(self, width: int, height: int | None = None) -> Group:
        """The prompt, the canvas, the legend and the figures; if they exceed `height`, only the
        part around the current block.
        """
        prompt = _wrapped(((c, "dim") for c in printable(self._prompt)), width)
        lines, focus = self._lines(width)
        legend, figures = self._legend(), self._figures()
        if height is not None:
            if len(prompt) > _PROMPT_LINES:
                prompt = [*prompt[: _PROMPT_LINES - 1], Text("...", "dim")]
            below = sum(-(-line.cell_len // width) for line in (legend, figures))
            room = max(1, height - len(prompt) - below - 3)
            start = max(0, min(focus - room // 2, len(lines) - room))
            lines = lines[start : start + room]
        return Group(*prompt, Text(), *lines, Text(), legend, figures)

    def _lines(self, width: int) -> tuple[list[Text], int]:
        """The lines of the canvas, and the index of the line with the current block."""
        canvas, pieces = self._canvas, []
        for at in range(canvas.size):
            if at not in canvas.tokens:
                pieces.append((MASKED, "" if at in self._block else "dim"))
                continue
            step = canvas.committed_at[at] + 1
            style = step_colour(step, canvas.nfe)
            if step == canvas.nfe:
                style += " bold underline"
            pieces.append((self._texts[canvas.tokens[at]], style))
        return _wrapped(pieces, width), len(_wrapped(pieces[: self._block.start], width)) - 1

    def _legend(self) -> Text:
        """The colours, from the first step to the last."""
        last, bar = self._canvas.nfe, min(self._canvas.nfe, 16)
        legend = Text("committed at step 1 ")
        for i in range(bar):
            step = 1 + round(i * (last - 1) / max(bar - 1, 1))
            legend.append("█", step_colour(step, last))
        legend.append(f" {last}, ")
        legend.append("just now", "bold underline")
        legend.append(f"; {MASKED} masked")
        return legend

    def _figures(self) -> Text:
        canvas, block = self._canvas, self._block
        return Text(
            f"NFE {canvas.nfe}   TPF {canvas.length(self._ends) / max(canvas.nfe, 1):.2f}   "
            f"positions {block.start}-{block.stop - 1}, step {self._step}   "
            f"{len(canvas.tokens)} of {canvas.size} committed"
        )


def _wrapped(pieces: Iterable[tuple[str, str]], width: int) -> list[Text]:
    """Lines of at most `width` columns; a piece is broken only if it is wider than that."""
    lines = [Text()]
    for text, style in pieces:
        for part in chop_cells(text, width):
            if lines[-1].cell_len + cell_len(part) > width:
                lines.append(Text())
            lines[-1].append(part, style)
    return lines
