"""A small SDAR checkpoint with random weights, in the tokenizer of the shipped models."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, Qwen3Config

from l2pd_adapters.huggingface.models import SDARForCausalLM
from l2pd_adapters.tiny_models import folder_of

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def random_sdar(folder: Path, block_length: int = 8) -> Path:
    """Its logits are spread widely enough that policies differ, and it ends some of its texts."""
    source = folder_of("tiny-llada")
    known = AutoConfig.from_pretrained(source)
    config = Qwen3Config(
        vocab_size=known.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=known.eos_token_id,
        pad_token_id=known.eos_token_id,
        mask_token_id=known.mask_token_id,
        block_length=block_length,
    )
    torch.manual_seed(0)
    model = SDARForCausalLM(config).float()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.25)
    model.generation_config = GenerationConfig.from_pretrained(source)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(source / name, folder / name)
    return folder
