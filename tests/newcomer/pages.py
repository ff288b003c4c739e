"""The commands of README.md and docs/, and what the pages say that they print."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"```sh\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)

LEFT_OUT = (
    ("make|accelerate|vllm|curl|.*sglang|transformers|VLLM_", "needs a clone, a GPU or a server"),
    ("pip install (?!-e)|source|python3 -m venv|cd |twine|python -m build", "asks an index"),
    (".*(GSAI-ML|MODEL|llada_filter|runs/llada)", "needs a checkpoint of the hub"),
    ("python -m l2pd_tools.lm_eval", "needs a checkpoint of the hub"),
    ("l2pd tune confidence_threshold --set", "tests/test_docs.py runs it"),
    ("l2pd demo", "make browser opens it"),
)
"""Starts of commands that a laptop without a network cannot run, and why."""

_FEWER = re.compile(r"l2pd (compare|tune) (?!.*--limit)")
"""Commands that decode all held-out prompts; here they decode three."""
_RANDOM_NUMBERS = ("first_filter.md",)
"""Pages whose numbers differ between machines, as they say; only words are compared."""


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    page: str
    words: tuple[str, ...]
    printed: str | None
    """What the page shows as its output."""

    @property
    def text(self) -> str:
        """As typed."""
        return shlex.join(self.words)

    def difference(self, output: str) -> str | None:
        """What the page shows and a terminal does not; None if there is nothing.

        The words of the page are on the terminal, in this order, and most numbers are: measured
        times never agree. The terminal also shows what the page leaves out.
        """
        shown = self.printed or ""
        if self.page in _RANDOM_NUMBERS:
            shown, output = (re.sub(r"=[\d.]+", "=...", text) for text in (shown, output))
        words, numbers = _split(shown)
        there, measured = _split(output)
        left = iter(there)
        missing = [word for word in words if word not in left]  # each search goes on from the last
        if missing:
            return f"the page shows {missing[0]!r}, and the terminal\n{output}"
        equal = (Counter(numbers) & Counter(measured)).total()
        if self.page not in _RANDOM_NUMBERS and equal < 0.7 * len(numbers):
            return f"the page shows the numbers {numbers}, and the terminal\n{output}"
        return None


def _split(text: str) -> tuple[list[str], list[str]]:
    """The words and the numbers of a text."""
    found = [word for word in text.split() if word != "..."]
    numbers = [word for word in found if re.fullmatch(r"[-+]?\d[\d.]*,?", word)]
    return [word for word in found if word not in numbers], numbers


def commands() -> Iterator[tuple[Command, str | None]]:
    """Every command of the pages, and why it is left out; None if it is run."""
    for page in PAGES:
        for block, printed in _BLOCK.findall(page.read_text(encoding="utf-8")):
            lines = block.replace("\\\n", " ").splitlines()
            # A request's body goes over several lines and belongs to a command that is left out.
            lines = [line for line in lines if re.match(r"[\w.]", line)]
            for line in lines:
                shown = printed if line is lines[-1] and printed else None
                reasons = (why for start, why in LEFT_OUT if re.match(start, line))
                reason = next(reasons, None)
                if reason is None and _FEWER.match(line):
                    line = f"{line.partition(' #')[0]} --limit 3"
                words = shlex.split(line, comments=True) if reason is None else [line]
                yield Command(page.name, tuple(words), shown), reason
