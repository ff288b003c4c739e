"""A random model of any size on Qwen3, as a checkpoint that vLLM loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config

from l2pd_adapters.tiny_models import folder_of


def save_random(
    model: type[PreTrainedModel],
    folder: Path,
    *,
    vocabulary: int,
    hidden: int,
    layers: int,
    head_dim: int,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    **config: Any,
) -> str:
    """Write a random model of this class, with the tokenizer of the small models; returns the
    folder's name.
    """
    torch.manual_seed(0)
    heads = hidden // head_dim or 1
    shape = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        tie_word_embeddings=False,
        eos_token_id=96,
        mask_token_id=97,
        dtype=dtype,
        **config,
    )
    with torch.device(device):
        made = model(shape).to(getattr(torch, dtype))
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((folder_of("tiny-llada") / name).read_bytes())
    return str(folder)
