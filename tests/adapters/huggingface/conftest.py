"""A small random diffusion language model: quick, and with an opinion about every position."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from l2pd_adapters.huggingface import enable
from l2pd_adapters.huggingface.block_causal import forward_for
from l2pd_adapters.huggingface.described import family_of
from l2pd_adapters.huggingface.forward import CanvasView
from l2pd_adapters.huggingface.models import SDARForCausalLM

MASK, EOT, BLOCK = 63, 62, 8


@pytest.fixture(scope="session")
def make_model():
    """Makes a random enabled model: "qwen3" or "llama" (bidirectional), or "sdar"."""
    return _make_model


def _make_model(architecture: str = "qwen3"):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "mask_token_id": MASK,
        "block_length": BLOCK,
    }
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, is_causal=False))
    elif architecture == "sdar":
        model = SDARForCausalLM(Qwen3Config(**shape, architectures=["SDARForCausalLM"]))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, is_causal=False))
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.25)
    model.generation_config.eos_token_id = EOT
    model.generation_config.pad_token_id = EOT
    return enable(model.eval(), name="random")


@pytest.fixture
def model():
    return _make_model()


@pytest.fixture(scope="session")
def tokenizer():
    """One token for every number below the random models' vocabulary."""
    words = WordLevel({str(i): i for i in range(64)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))


@pytest.fixture
def prompts():
    """Five prompts of 3 to 11 tokens, padded on the left: ids and mask."""
    generator = torch.Generator().manual_seed(1)
    lengths = [11, 3, 7, 5, 9]
    ids = torch.full((5, 11), EOT)
    mask = torch.zeros(5, 11, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(0, 60, (length,), generator=generator)
        mask[row, -length:] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def block_logits():
    """What predicts the last positions of texts: block_logits(model, rows, length) -> (R, L, V)."""
    return _block_logits


@torch.no_grad()
def _block_logits(model, rows, length):
    """By the passes that decode, texts padded on the left."""
    width = max(map(len, rows))
    first = [width - len(row) for row in rows]
    padded = torch.stack(
        [torch.cat([torch.full((n,), EOT), row]) for n, row in zip(first, rows, strict=True)]
    )
    columns = torch.arange(width).expand(len(rows), -1)
    begin = torch.tensor(first).unsqueeze(-1)
    view = CanvasView(
        tokens=padded,
        attention=(columns >= begin).long(),
        position_ids=(columns - begin).clamp(min=0),
        starts=[width - length] * len(rows),
        first=first,
        last=[width] * len(rows),
        fresh=[True] * len(rows),
        block_length=length,
    )
    forward = forward_for(model, family_of(model), "none")
    hidden = forward.hidden(view)
    return forward.logits(hidden, torch.arange(len(rows) * length)).view(len(rows), length, -1)
