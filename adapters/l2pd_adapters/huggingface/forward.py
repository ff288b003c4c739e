"""The forward pass: hidden states of the whole canvas, logits of the rows that are needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.families import ModelFamily


def hidden_states(
    model: Any, tokens: Tensor, attention: Tensor | None, position_ids: Tensor
) -> Tensor:
    """(R, S) tokens -> (R, S, D), the decoder's last hidden states, without a KV cache.

    `attention` is 1 where a position may be seen; None if that is everywhere.
    """
    out = model.get_decoder()(
        input_ids=tokens, attention_mask=attention, position_ids=position_ids, use_cache=False
    )
    hidden: Tensor = out.last_hidden_state
    return hidden


def logits_at(model: Any, family: ModelFamily, hidden: Tensor, columns: Tensor) -> Tensor:
    """Logits that predict the positions `columns` ((N,) int64, flat over (R, S)): (N, V).

    The language-model head of a vocabulary of 150,000 costs as much as many layers, so it never
    sees the rows that nobody asks about.
    """
    flat = hidden.flatten(0, 1)
    rows = flat.index_select(0, (columns - family.logit_shift).clamp(min=0))
    with torch.no_grad():
        logits: Tensor = model.get_output_embeddings()(rows)
    return logits
