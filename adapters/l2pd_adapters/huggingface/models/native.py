"""The model class of each family's checkpoints.

Most are transformers' own decoders under the family's name, so that `save_pretrained` writes a
checkpoint of the same family (`architectures` in config.json).
"""

from __future__ import annotations

from typing import Any

from transformers import (
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from l2pd_adapters.huggingface.models.llada2 import LLaDA2MoeModelLM


class LLaDAModelLM(LlamaForCausalLM):
    """LLaDA: bidirectional, on Llama."""


class DreamModel(Qwen2ForCausalLM):
    """Dream: bidirectional, on Qwen2; the logits of a position are those of the one before."""


class SDARForCausalLM(Qwen3ForCausalLM):
    """SDAR: block-causal, on Qwen3."""


class SDARMoeForCausalLM(Qwen3MoeForCausalLM):
    """SDAR with experts: block-causal, on Qwen3-MoE."""


MODELS: dict[str, Any] = {
    model.__name__: model
    for model in (
        LLaDAModelLM,
        DreamModel,
        SDARForCausalLM,
        SDARMoeForCausalLM,
        LLaDA2MoeModelLM,
    )
}
"""The classes by architecture. `config_class` reads the family's `native_config`."""
