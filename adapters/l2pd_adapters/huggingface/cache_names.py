"""The names that transformers has for a cache of keys and values: `cache` since 5.24, before that
`past_key_values`, which 5.40 no longer accepts.
"""

from __future__ import annotations

import inspect
from dataclasses import fields

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAMES = ("cache", "past_key_values")
"""Both names, the newer first."""

CACHE = next(
    name for name in CACHE_NAMES if name in {each.name for each in fields(BaseModelOutputWithPast)}
)
"""The name that the installed transformers uses for its own arguments and outputs."""


def cache_argument(module: type[nn.Module]) -> str:
    """The name that the forward of a class has for its cache. Code that does not belong to
    transformers may keep the old name in any release."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE)
