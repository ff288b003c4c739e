"""LLaDA2 (inclusionAI/LLaDA2.0 and 2.1), which transformers does not have.

A mixture of experts in the BailingMoeV2 architecture with block-causal attention. Config fields and
weight names are those of the hub; what the architecture shares with GLM-4 MoE (norm, rotary
embedding, experts) is transformers' own code. In memory the experts of a layer are one tensor, as
everywhere in transformers, so that its fast kernels for experts apply.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeExperts,
    Glm4MoeMLP,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from l2pd_adapters.huggingface.cache_names import CACHE, CACHE_NAMES


class LLaDA2MoeConfig(PreTrainedConfig):
    """The config of the hub's checkpoints; the defaults are those of LLaDA2.0-mini.

    Raises ValueError for settings of LLaDA2 checkpoints that this module does not support.
    """

    model_type = "llada2_moe"
    keys_to_ignore_at_inference = CACHE_NAMES
    attribute_map = {  # noqa: RUF012  (as transformers has it)
        "n_routed_experts": "num_experts",
        "num_local_experts": "num_experts",
    }

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 600_000.0
    partial_rotary_factor: float = 0.5
    rope_parameters: dict | None = None
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    attention_dropout: float = 0.0
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int | None = 1
    moe_intermediate_size: int = 512
    moe_shared_expert_intermediate_size: int | None = None
    first_k_dense_replace: int = 1
    n_group: int = 8
    topk_group: int = 4
    score_function: str = "sigmoid"
    moe_router_enable_expert_bias: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892
    mask_token_id: int | None = 156895
    block_length: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.block_length = self.block_length or getattr(self, "block_size", 32)
        # A group's score is the sum of its two best experts.
        if self.n_group and self.num_experts < 2 * self.n_group:
            raise ValueError(
                f"{self.num_experts} experts in n_group={self.n_group} groups: expected at "
                "least two in each"
            )
        for name, supported in _ONLY.items():
            value = getattr(self, name, None)
            if value is not None and value != supported:
                raise ValueError(f"LLaDA2 with {name}={value!r} is not supported")


_ONLY = {
    "score_function": "sigmoid",
    "use_qk_norm": True,
    "moe_router_enable_expert_bias": True,
    "norm_head": False,
    "expert_capacity": None,
}
"""Fields of the hub's configs that have the same value in all of LLaDA2.0 and 2.1."""


class LLaDA2MoeAttention(nn.Module):
    """Grouped-query attention; queries and keys are normalised per head, then partly rotated."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.heads = [config.num_attention_heads, *[config.num_key_value_heads] * 2]
        """Sizes of queries, keys and values, in their order in `query_key_value`."""
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        hidden, width = config.hidden_size, sum(self.heads) * self.head_dim
        self.query_key_value = nn.Linear(hidden, width, bias=config.use_qkv_bias)
        self.query_layernorm = Glm4MoeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = Glm4MoeRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.heads[0] * self.head_dim, hidden, bias=config.use_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, T, D) -> (B, T, D)."""
        cache: Cache | None = kwargs.pop(CACHE, None)
        shape = hidden_states.shape[:-1]
        projected = self.query_key_value(hidden_states).view(*shape, -1, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in projected.split(self.heads, dim=-2))
        query, key = apply_rotary_pos_emb(
            self.query_layernorm(query), self.key_layernorm(key), *position_embeddings
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        attended, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dense(attended.reshape(*shape, -1))


class LLaDA2MoeGate(nn.Module):
    """Chooses the experts of each token and their weights; float32 throughout."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (N, D) -> experts (N, k) int64 and their weights (N, k) float32.

        The bias affects which experts are chosen, but not their weights.
        """
        config = self.config
        scores = nn.functional.linear(tokens.float(), self.weight.float()).sigmoid()
        merit = self._within_best_groups(scores + self.expert_bias)
        experts = merit.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if config.norm_topk_prob and config.num_experts_per_tok > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor

    def _within_best_groups(self, merit: Tensor) -> Tensor:
        """merit (N, E) with -inf outside the `topk_group` groups with the highest sums of their two
        best experts.
        """
        config = self.config
        if not config.n_group:
            return merit
        groups = merit.view(len(merit), config.n_group, -1)
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(config.topk_group, dim=-1).indices
        outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        return groups.masked_fill(outside.unsqueeze(-1), -torch.inf).view_as(merit)


class LLaDA2MoeSparseMoeBlock(nn.Module):
    """The chosen experts of each token, and the shared experts of all tokens."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__()
        self.gate = LLaDA2MoeGate(config)
        self.experts = Glm4MoeExperts(config)
        self.shared_experts = None
        if config.num_shared_experts:
            width = config.moe_shared_expert_intermediate_size or config.moe_intermediate_size
            self.shared_experts = Glm4MoeMLP(config, width * config.num_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (B, T, D) -> (B, T, D)."""
        tokens = hidden_states.flatten(0, 1)
        experts, weights = self.gate(tokens)
        found = self.experts(tokens, experts, weights.to(tokens.dtype)).view_as(hidden_states)
        return found if self.shared_experts is None else found + self.shared_experts(hidden_states)


class LLaDA2MoeDecoderLayer(GradientCheckpointingLayer):
    """One layer; the first `first_k_dense_replace` have a plain MLP instead of experts."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int) -> None:
        super().__init__()
        dense = layer_idx < config.first_k_dense_replace
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        self.mlp = Glm4MoeMLP(config) if dense else LLaDA2MoeSparseMoeBlock(config)
        self.input_layernorm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states (B, T, D) -> (B, T, D)."""
        attended = self.attention(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    """Attributes that transformers needs for every LLaDA2 module."""

    config: LLaDA2MoeConfig
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]  # noqa: RUF012  (as transformers has it)
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, LLaDA2MoeGate):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.expert_bias)
        elif isinstance(module, Glm4MoeExperts):
            for weight in (module.gate_up_proj, module.down_proj):
                assert isinstance(weight, Tensor)
                init.normal_(weight, mean=0.0, std=std)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """The decoder: a position attends to its own block of `config.block_length` and to those before
    it.
    """

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [LLaDA2MoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        same_fields: Any = config
        self.rotary_emb = Glm4MoeRotaryEmbedding(config=same_fields)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.word_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states (B, T, D) of input_ids (B, T).

        attention_mask is (B, S) with zeros on padding, from which the block-causal mask is made, or
        a mask (B, 1, T, S) that is used as it is. Positions, and with them the borders of the
        blocks, are counted from a row's first token that is not padding. `past_key_values` is
        another name of `cache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        assert inputs_embeds is not None
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        named: dict[str, Any] = {CACHE: cache}
        of_keys = self._positions(inputs_embeds, attention_mask, cache)
        if position_ids is None:
            position_ids = of_keys[:, -inputs_embeds.shape[1] :]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            block_sequence_ids=of_keys // self.config.block_length,
            **named,
        )
        rotation = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=rotation,
                attention_mask=mask,
                **named,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named)

    @staticmethod
    def _positions(embedded: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """(B, S): number of non-padding tokens before each, including cached ones."""
        rows, count = embedded.shape[:2]
        if mask is not None and mask.ndim == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)
        seen = 0 if cache is None else cache.get_seq_length()
        return torch.arange(seen + count, device=embedded.device).expand(rows, -1)


class LLaDA2MoeModelLM(LLaDA2MoePreTrainedModel, GenerationMixin):
    """LLaDA2 under the name that its checkpoints have in `architectures`."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (B, T, V), of the last `logits_to_keep` positions or of those it names; the other
        arguments are those of `LLaDA2MoeModel`."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        named: dict[str, Any] = {CACHE: out[CACHE]} if CACHE in out else {}
        return MoeCausalLMOutputWithPast(
            logits=self.lm_head(out.last_hidden_state[:, kept]), **named
        )


if get_checkpoint_conversion_mapping(LLaDA2MoeConfig.model_type) is None:
    # On the hub every expert has separate weights, as in Qwen2 MoE; transformers merges them on
    # loading and splits them again on saving.
    _mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    assert _mapping is not None
    register_checkpoint_conversion_mapping(LLaDA2MoeConfig.model_type, _mapping)
