"""The sizes of small models, and random weights that make them decide."""

from __future__ import annotations

import torch

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
DECODER = {
    **SIZES,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}


def spread(model: torch.nn.Module, std: float) -> None:
    """Draw all matrices anew: logits so widely spread that policies differ."""
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=std)
