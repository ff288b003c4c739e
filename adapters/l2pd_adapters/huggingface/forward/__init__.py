"""Forward passes of a decode: hidden states of each batch row's block, and the needed logits."""

from __future__ import annotations

from typing import Any

from l2pd_adapters.families import CacheKind, ModelFamily
from l2pd_adapters.huggingface.forward.base import LOOKING_AHEAD, CanvasView, Forward
from l2pd_adapters.huggingface.forward.bidirectional import BidirectionalForward
from l2pd_adapters.huggingface.forward.block_causal import BlockCausalForward

__all__ = [
    "LOOKING_AHEAD",
    "CanvasView",
    "Forward",
    "forward_for",
]


def forward_for(model: Any, family: ModelFamily, cache: CacheKind) -> Forward:
    """The forward passes that fit the model's family."""
    if family.attention == "block_causal":
        return BlockCausalForward(model, family, cache)
    return BidirectionalForward(model, family, cache)
