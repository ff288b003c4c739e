"""Whether code warns: by Python's warnings, or in transformers' log."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _Kept(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def no_warnings(about: str = "") -> Iterator[None]:
    """A block in which nothing may warn, including what transformers says only once; `about`: no
    warning may contain this."""
    lines: list[str] = []
    handler = _Kept(lines)
    library = logging.getLogger("transformers")
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # transformers adds it
    library.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            yield
    finally:
        library.removeHandler(handler)
    said = lines + [str(each.message) for each in raised]
    said = [each for each in said if about in each]
    assert not said, said
