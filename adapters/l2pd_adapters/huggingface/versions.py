"""The range of transformers that this adapter runs on."""

from __future__ import annotations

import os
from importlib.metadata import version

from l2pd_plugins.errors import L2PDError

SUPPORTED_TRANSFORMERS = ("5.11", "6")
"""At least the first, below the second. Before 5.0 `is_causal = False` had no effect; 5.11 brought
the streamer for diffusion models."""

OPT_OUT = "L2PD_ANY_TRANSFORMERS"


def check_transformers() -> None:
    """Raise L2PDError if the installed transformers lies outside the range (unless opted out)."""
    installed = version("transformers")
    low, high = SUPPORTED_TRANSFORMERS
    if _key(low) <= _key(installed) < _key(high) or os.environ.get(OPT_OUT) == "1":
        return
    raise L2PDError(
        f"transformers {installed} is outside the supported range >={low},<{high}; "
        f"{OPT_OUT}=1 tries it all the same"
    )


def _key(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
