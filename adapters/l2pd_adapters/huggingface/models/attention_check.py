"""Checks that the attention of a user's model is as its `ModelFamily` says.

Most decoders of transformers honour `config.is_causal`, some do not. A decoder that remains causal
would decode nonsense without an error.
"""

from __future__ import annotations

from typing import Any

import torch

from l2pd_adapters.families import ModelFamily
from l2pd_adapters.huggingface.forward import CanvasView, forward_for
from l2pd_plugins.errors import L2PDError

LENGTH = 4
"""Length of the block in the check, in positions."""


@torch.no_grad()
def check_attention(model: Any, family: ModelFamily, mask_token_id: int) -> None:
    """Raise L2PDError unless the first position of a block attends to its last one (two forward
    passes of a few tokens).
    """
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
            f"{type(model).__name__} a position does not see later positions{hint}"
        )
