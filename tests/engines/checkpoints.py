"""Small random checkpoints on Qwen3, in the tokenizer of the shipped models."""

import shutil

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from l2pd_adapters.huggingface.models.native import SDARForCausalLM
from l2pd_adapters.tiny_models import folder_of
from tests.small_models import DECODER, spread

SOURCE = folder_of("tiny-llada")
VOCABULARY, MASK, EOT = 101, 97, 96


def add_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SOURCE / name, folder / name)


def causal_qwen3(folder):
    """Folder of an autoregressive model."""
    return _written(Qwen3ForCausalLM, folder)


def random_sdar(folder, block_length=8):
    """Folder of an SDAR. Its logits are spread widely enough that policies differ, and it ends some
    of its texts."""
    return _written(
        SDARForCausalLM,
        folder,
        std=0.25,
        generation_config=GenerationConfig.from_pretrained(SOURCE),
        mask_token_id=MASK,
        block_length=block_length,
    )


def random_bidirectional(folder, block_length=32, ends=(EOT,)):
    """The same for a bidirectional model, whose answers caches change. ends: the tokens that end a
    text."""
    return _written(
        Qwen3ForCausalLM,
        folder,
        std=0.25,
        generation_config=GenerationConfig(eos_token_id=list(ends), pad_token_id=EOT),
        mask_token_id=MASK,
        block_length=block_length,
        is_causal=False,
    )


def _written(architecture, folder, *, std=None, generation_config=None, **more):
    config = Qwen3Config(
        **DECODER | {"intermediate_size": 128},
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        eos_token_id=EOT,
        pad_token_id=EOT,
        **more,
    )
    torch.manual_seed(0)
    model = architecture(config).float()
    if std:
        spread(model, std)
    if generation_config is not None:
        model.generation_config = generation_config
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder
