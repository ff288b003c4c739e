"""Unmask policies of diffusion language models as plugins.

This package is the core: what a policy is, how plugins are found, and the one denoising step that
turns logits into committed tokens. It knows no engine and no particular policy, and importing it
imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.hookspecs import hookimpl
from l2pd_plugins.plugins import create_policy, list_policies
from l2pd_plugins.policy import (
    DenoisingStep,
    ModelContext,
    PolicySpec,
    RemaskingPolicy,
    UnmaskPolicy,
)

if TYPE_CHECKING:
    from l2pd_plugins.options import policy_options

__all__ = [
    "DenoisingStep",
    "L2PDError",
    "ModelContext",
    "PolicySpec",
    "RemaskingPolicy",
    "UnmaskPolicy",
    "create_policy",
    "hookimpl",
    "list_policies",
    "policy_options",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `policy_options` on first use: its module imports pydantic, which listing policies
    does not need.
    """
    if name == "policy_options":
        from l2pd_plugins.options import policy_options

        return policy_options
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
