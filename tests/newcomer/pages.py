"""The commands of README.md and docs/, and what the pages say that they print."""

from __future__ import annotations

import re
import shlex
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
        """How an output differs from what the page shows; None if it does not.

        The words are equal, in this order, and most numbers are: measured times never agree.
        """
        if self.printed is None:
            return None
        wanted, found = _split(self.printed), _split(output)
        if wanted.words != found.words:
            return f"the page shows\n{self.printed}\nand it prints\n{output}"
        equal = sum(map(str.__eq__, wanted.numbers, found.numbers))
        if self.page not in _RANDOM_NUMBERS and equal < 0.7 * len(wanted.numbers):
            return f"the page shows the numbers {wanted.numbers} and it prints {found.numbers}"
        return None


@dataclass(frozen=True)
class _Split:
    words: list[str]
    numbers: list[str]


def _split(text: str) -> _Split:
    words, numbers = [], []
    for word in text.split():
        (numbers if re.fullmatch(r"[-+]?\d[\d.]*,?", word) else words).append(word)
    return _Split(words, numbers)


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
