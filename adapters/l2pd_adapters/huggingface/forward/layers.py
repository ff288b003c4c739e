"""Runs a decoder layer by layer; the last layer computes only the needed columns.

A denoising step reads the hidden states of one block. All layers except the last need all columns.
In the last layer the other columns are only keys and values, so their queries, attention and MLP
are skipped. The results are equal to those of the decoder's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel, Qwen2Model, Qwen3Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
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
    """The modules of a bidirectional Llama, Qwen2 or Qwen3 decoder, called one after another.

    The norms, projections and MLPs are called as modules, so that replacements (LoRA, a quantised
    layer) work; the operations between them are done here, in the same order.
    """

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self._rotary: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(cls, decoder: Any) -> Layers | None:
        """The layers of a decoder; None if it is of another class, or if calling one of its modules
        does more than the forward of its class (a hook, a compiled or replaced forward).
        """
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
        if any(map(_changed, _modules(decoder))) or any(_global_hooks()):
            return None
        return cls(decoder)

    def __call__(
        self, tokens: Tensor, position_ids: Tensor, wanted: slice | Tensor, cache: Any = None
    ) -> Tensor:
        """Hidden states (R, C, D) of the needed columns of tokens (R, T), given as a slice of the T
        columns or as (R, C) int64 for each row. Every column attends to every other, including
        cached ones.
        """
        hidden = self.decoder.embed_tokens(tokens)
        rotary = self._rotary_of(hidden, position_ids)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.decoder.config._attn_implementation, eager_attention_forward
        )
        *others, last = self.decoder.layers
        for layer in others:
            normed = layer.input_layernorm(hidden)
            heads = _heads(layer.self_attn, normed, normed, rotary, rotary)
            hidden = _layer(layer, hidden, *heads, cache, attend)
        normed = last.input_layernorm(hidden)
        mine, of_mine = columns_of(normed, wanted), tuple(columns_of(e, wanted) for e in rotary)
        heads = _heads(last.self_attn, mine, normed, of_mine, rotary)
        hidden = _layer(last, columns_of(hidden, wanted), *heads, cache, attend)
        found: Tensor = self.decoder.norm(hidden)
        return found

    def _rotary_of(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions; computed again only if the tensor object changes."""
        if self._rotary is None or self._rotary[0] is not position_ids:
            self._rotary = position_ids, self.decoder.rotary_emb(hidden, position_ids=position_ids)
        return self._rotary[1]


def _layer(
    layer: Any,
    hidden: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    attend: Callable[..., Any],
) -> Tensor:
    """The output of a layer for hidden (R, C, D), whose queries are (R, heads, C, size)."""
    attention = layer.self_attn
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    if (
        attend is sdpa_attention_forward and key.shape[1] == query.shape[1]
    ):  # then this is all that it does
        seen = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        seen = seen.transpose(1, 2)
    else:
        still = {"dropout": 0.0, "scaling": attention.scaling, "is_causal": False}
        seen, _ = attend(attention, query, key, value, None, **still)
    hidden = hidden + attention.o_proj(seen.reshape(*hidden.shape[:2], -1))
    after: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return after


def _heads(
    attention: Any,
    mine: Tensor,
    every: Tensor,
    rotation_of_mine: tuple[Tensor, ...],
    rotation_of_every: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the columns `mine` (R, C, D), keys and values of `every` (R, T, D), each
    (R, heads, columns, size)."""
    size = attention.head_dim

    def split(projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], -1, size)

    query, key = split(attention.q_proj(mine)), split(attention.k_proj(every))
    if isinstance(attention, Qwen3Attention):
        query, key = attention.q_norm(query), attention.k_norm(key)
    value = split(attention.v_proj(every)).transpose(1, 2)
    query = _rotated(query.transpose(1, 2), *rotation_of_mine)
    return query, _rotated(key.transpose(1, 2), *rotation_of_every), value


def columns_of(values: Tensor, wanted: slice | Tensor) -> Tensor:
    """(R, C, D) of values (R, T, D): a slice of the columns, or (R, C) int64 of each row's own."""
    if isinstance(wanted, slice):
        return values[:, wanted]
    return values.gather(1, wanted.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (R, heads, C, size) with the rotation (R, C, size) of their positions."""
    turned = rotate_half(heads).mul_(sin.unsqueeze(1))
    return (heads * cos.unsqueeze(1)).add_(turned)


def _modules(root: nn.Module) -> Iterator[nn.Module]:
    """The module and all its submodules, as `modules()`, but faster."""
    left = [root]
    while left:
        module = left.pop()
        yield module
        left += (child for child in module._modules.values() if child is not None)


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
