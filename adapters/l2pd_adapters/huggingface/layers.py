"""A decoder layer by layer, whose last layer computes the wanted columns alone.

A denoising step reads the hidden states of one block. Every layer but the last needs all columns;
of the last one the others are keys and values only, so their queries, their attention and their MLP
are left out. What a column gets is what the decoder's own forward gives it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel, Qwen2Model, Qwen3Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    eager_attention_forward,
    rotate_half,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

_LAYERS: dict[type, tuple[type, type]] = {
    LlamaModel: (LlamaDecoderLayer, LlamaAttention),
    Qwen2Model: (Qwen2DecoderLayer, Qwen2Attention),
    Qwen3Model: (Qwen3DecoderLayer, Qwen3Attention),
}
_ATTENTIONS = ("sdpa", "eager")


class Layers:
    """The modules of a bidirectional Llama, Qwen2 or Qwen3 decoder, called one after another."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self._rotary: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, decoder: Any) -> Layers | None:
        """The layers of a decoder; None if it is of another kind, or if calling one of its modules
        does more than the forward of its class: a hook, a compiled or replaced forward."""
        if type(decoder) not in _LAYERS or decoder.training:
            return None
        config = decoder.config
        kind, attention = _LAYERS[type(decoder)]
        layers = list(decoder.layers)
        if (
            getattr(config, "is_causal", True) is not False
            or config._attn_implementation not in _ATTENTIONS
            or len(layers) != config.num_hidden_layers
            or {type(layer) for layer in layers} != {kind}
            or {type(layer.self_attn) for layer in layers} != {attention}
            or any(getattr(layer.self_attn, "sliding_window", None) for layer in layers)
        ):
            return None
        if any(map(_changed, decoder.modules())) or any(_global_hooks()):
            return None
        return cls(decoder)

    def __call__(
        self, tokens: Tensor, position_ids: Tensor, wanted: slice | Tensor, cache: Any = None
    ) -> Tensor:
        """Hidden states (R, C, D) of the wanted columns of tokens (R, T): a slice of the T, or
        (R, C) int64 of each row's own. Every column sees every other, those of the cache too."""
        hidden = self.decoder.embed_tokens(tokens)
        rotary = self._rotary_of(hidden, position_ids)
        shared = {
            "attention_mask": None,
            "position_embeddings": rotary,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": cache is not None,
            "is_causal": False,
        }
        *others, last = self.decoder.layers
        for layer in others:
            hidden = layer(hidden, **shared)
        normed = last.input_layernorm(hidden)
        hidden = columns_of(hidden, wanted)
        hidden = hidden + self._attention(last.self_attn, normed, wanted, rotary, cache)
        hidden = hidden + last.mlp(last.post_attention_layernorm(hidden))
        found: Tensor = self.decoder.norm(hidden)
        return found

    def _rotary_of(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, computed once where they stay the same tensor."""
        if self._rotary is None or self._rotary[0] is not position_ids:
            self._rotary = position_ids, self.decoder.rotary_emb(hidden, position_ids=position_ids)
        return self._rotary[1]

    def _attention(
        self,
        attention: Any,
        hidden: Tensor,
        wanted: slice | Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: Any,
    ) -> Tensor:
        """What the wanted columns (R, C) of hidden (R, T, D) get from all columns: (R, C, D)."""
        rows, size = hidden.shape[0], attention.head_dim

        def heads(projected: Tensor) -> Tensor:
            return projected.view(rows, projected.shape[1], -1, size)

        mine = columns_of(hidden, wanted)
        query, key = heads(attention.q_proj(mine)), heads(attention.k_proj(hidden))
        if isinstance(attention, Qwen3Attention):
            query, key = attention.q_norm(query), attention.k_norm(key)
        cos, sin = rotary
        query = _rotated(query.transpose(1, 2), columns_of(cos, wanted), columns_of(sin, wanted))
        key = _rotated(key.transpose(1, 2), cos, sin)
        value = heads(attention.v_proj(hidden)).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
        seen, _ = attend(
            attention,
            query,
            key,
            value,
            None,
            dropout=0.0,
            scaling=attention.scaling,
            is_causal=False,
        )
        found: Tensor = attention.o_proj(seen.reshape(rows, mine.shape[1], -1))
        return found


def columns_of(values: Tensor, wanted: slice | Tensor) -> Tensor:
    """(R, C, D) of values (R, T, D): a slice of the columns, or (R, C) int64 of each row's own."""
    if isinstance(wanted, slice):
        return values[:, wanted]
    return values.gather(1, wanted.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (R, heads, C, size) with the rotation (R, C, size) of their positions."""
    return (heads * cos.unsqueeze(1)) + (rotate_half(heads) * sin.unsqueeze(1))


def _changed(module: nn.Module) -> bool:
    """Whether calling the module does more than the forward of its class."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl")
    )


def _global_hooks() -> tuple[Any, Any]:
    module = torch.nn.modules.module
    return module._global_forward_hooks, module._global_forward_pre_hooks
