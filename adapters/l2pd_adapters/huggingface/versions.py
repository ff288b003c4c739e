"""The range of transformers that this adapter runs on."""

from __future__ import annotations

from l2pd_adapters.versions import outside_range
from l2pd_plugins.errors import L2PDError

SUPPORTED_TRANSFORMERS = ("5.11", "6")
"""At least the first, below the second. Before 5.0 `is_causal = False` had no effect; 5.11 brought
the streamer for diffusion models."""

OPT_OUT = "L2PD_ANY_TRANSFORMERS"


def check_transformers() -> None:
    """Raise L2PDError if the installed transformers lies outside the range (unless opted out)."""
    problem = outside_range("transformers", SUPPORTED_TRANSFORMERS, OPT_OUT)
    if problem:
        raise L2PDError(problem)
