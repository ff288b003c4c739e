"""Whether a model that a user has described sees what it is said to see.

Most decoders of transformers follow `config.is_causal`, some do not; one that goes on looking back
only would decode, without an error, nonsense.
"""

from __future__ import annotations

from typing import Any

import torch

from l2pd_adapters.families import ModelFamily
from l2pd_adapters.huggingface.forward import CanvasView, forward_for
from l2pd_plugins.errors import L2PDError

LENGTH = 4
"""Positions of the block that is looked at."""


@torch.no_grad()
def check_attention(model: Any, family: ModelFamily, mask_token_id: int) -> None:
    """Raise L2PDError unless the first position of a block sees its last one (two forward passes
    of a few tokens)."""
    width = LENGTH + family.logit_shift
    tokens = torch.full((2, width), mask_token_id, device=model.device)
    tokens[1, -1] = 0 if mask_token_id else 1
    view = CanvasView(
        tokens=tokens,
        attention=torch.ones_like(tokens),
        position_ids=torch.arange(width, device=model.device).expand(2, -1),
        starts=[family.logit_shift] * 2,
        first=[0, 0],
        last=[width, width],
        fresh=[True, True],
        block_length=LENGTH,
    )
    first, second = forward_for(model, family, "none").hidden(view)[:, 0]
    if torch.equal(first, second):
        hint = ""
        if family.attention == "bidirectional":
            hint = (
                "; most decoders become bidirectional by is_causal=False in the config, before the "
                "model is made (load(..., family=...) sets it)"
            )
        raise L2PDError(
            f"family {family.name!r}: attention={family.attention!r}, but in "
            f"{type(model).__name__} a position does not see the ones behind it{hint}"
        )
