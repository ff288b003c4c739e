"""The range of transformers that this adapter runs on."""

from __future__ import annotations

from l2pd_adapters.engines import TRANSFORMERS
from l2pd_adapters.versions import outside_range
from l2pd_plugins.errors import L2PDError

SUPPORTED_TRANSFORMERS = TRANSFORMERS.supported
"""At least the first, below the second."""

OPT_OUT = TRANSFORMERS.opt_out


def check_transformers() -> None:
    """Raise L2PDError if the installed transformers lies outside the range (unless opted out)."""
    problem = outside_range("transformers", SUPPORTED_TRANSFORMERS, OPT_OUT)
    if problem:
        raise L2PDError(problem)
