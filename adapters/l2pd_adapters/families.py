"""How each model family is read: one table for all engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from l2pd_plugins.errors import L2PDError

Attention = Literal["bidirectional", "block_causal"]
"""Which positions a position sees. "bidirectional": all of prompt and canvas. "block_causal": those
of its own block and of the blocks before it, blocks being counted from the prompt's first token."""


@dataclass(frozen=True)
class ModelFamily:
    """What an engine has to know to decode a family of diffusion language models."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` of its checkpoints."""
    attention: Attention
    architecture: str | None = None
    """The name in `config.architectures` that tells its checkpoints from others on `decoder`."""
    decoder: str | None = None
    """The native model type whose code and weight names fit, where `model_types` are those of
    remote code; checkpoints that name the `architecture` may have it as their model type."""
    block_length: int = 32
    """Positions per block where the checkpoint's config names none."""
    mask_token_id: int | None = None
    """The mask token where the checkpoint's config names none."""
    logit_shift: int = 0
    """How far before a position the logits that predict it are."""
    config_names: Mapping[str, str] = field(default_factory=dict)
    """What `decoder` calls the settings of the checkpoint's config, where the names differ."""
    weight_names: tuple[tuple[str, str], ...] = ()
    """Parts of the names of the checkpoint's weights, and what `decoder` calls them; each that fits
    is replaced, in this order."""

    def native_config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a checkpoint's config.json as `decoder` names them."""
        native = {self.config_names.get(name, name): value for name, value in values.items()}
        native.pop("auto_map", None)  # the way to the checkpoint's own code
        return native | {"model_type": self.decoder, "architectures": [self.architecture]}

    def native_weight(self, name: str) -> str:
        """The name of a checkpoint's weight as `decoder` has it."""
        for theirs, native in self.weight_names:
            name = name.replace(theirs, native)
        return name

    def prompt_in_block(self, prompt_length: int, block_length: int) -> int:
        """How many positions of the first block to be decoded hold the end of the prompt.

        None in a bidirectional model, whose first block begins with the canvas. A block-causal
        model completes the block that the prompt has begun.
        """
        return prompt_length % block_length if self.attention == "block_causal" else 0


_LLADA_CONFIG = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "include_bias": "attention_bias",
}

FAMILIES = (
    ModelFamily(
        name="LLaDA",  # GSAI-ML/LLaDA-8B, arXiv 2502.09992
        model_types=("llada",),
        attention="bidirectional",
        architecture="LLaDAModelLM",
        decoder="llama",
        mask_token_id=126336,
        config_names=_LLADA_CONFIG,
        weight_names=(
            ("model.transformer.wte.", "model.embed_tokens."),
            ("model.transformer.ln_f.", "model.norm."),
            ("model.transformer.ff_out.", "lm_head."),
            ("model.transformer.blocks.", "model.layers."),
            (".attn_norm.", ".input_layernorm."),
            (".q_proj.", ".self_attn.q_proj."),
            (".k_proj.", ".self_attn.k_proj."),
            (".v_proj.", ".self_attn.v_proj."),
            (".attn_out.", ".self_attn.o_proj."),
            (".ff_norm.", ".post_attention_layernorm."),
            (".ff_proj.", ".mlp.gate_proj."),
            (".up_proj.", ".mlp.up_proj."),
            (".ff_out.", ".mlp.down_proj."),
        ),
    ),
    ModelFamily(
        name="Dream",  # Dream-org/Dream-v0-7B, arXiv 2508.15487
        model_types=("Dream",),
        attention="bidirectional",
        architecture="DreamModel",
        decoder="qwen2",
        mask_token_id=151666,
        logit_shift=1,
    ),
    ModelFamily(
        name="LLaDA2",  # inclusionAI/LLaDA2.0-mini
        model_types=("llada2_moe",),
        attention="block_causal",
        architecture="LLaDA2MoeModelLM",
        mask_token_id=156895,
    ),
    ModelFamily(
        name="SDAR",  # JetAstra/SDAR, arXiv 2510.06303
        model_types=("sdar",),
        attention="block_causal",
        architecture="SDARForCausalLM",
        decoder="qwen3",
        block_length=4,
        mask_token_id=151669,
    ),
    ModelFamily(
        name="bidirectional decoder",
        model_types=("llama", "qwen3"),
        attention="bidirectional",
    ),
)


def family_of(config: Any) -> ModelFamily:
    """The family of a model, by its config.

    Raises L2PDError if the config describes no diffusion language model that can be decoded here.
    """
    model_type = getattr(config, "model_type", None)
    architectures = getattr(config, "architectures", None) or ()
    for family in FAMILIES:
        if family.architecture in architectures and model_type == family.decoder:
            return family
        if model_type in family.model_types:
            causal = getattr(config, "is_causal", True) is not False
            if family.attention == "bidirectional" and causal:
                raise L2PDError(
                    f"model type {model_type!r} with causal attention is an autoregressive model; "
                    "a diffusion language model on this architecture has is_causal=false in its "
                    f"config, or one of {_named_architectures()} in its architectures"
                )
            return family
    known = sorted({name for family in FAMILIES for name in family.model_types})
    raise L2PDError(f"model type {model_type!r} is not supported; known: {', '.join(known)}")


def _named_architectures() -> str:
    return ", ".join(family.architecture for family in FAMILIES if family.architecture)


def mask_token_of(config: Any) -> int:
    """The id of the mask token: the config's `mask_token_id`, else the family's.

    Raises L2PDError if there is none, or none within the vocabulary.
    """
    mask_token_id = getattr(config, "mask_token_id", None)
    if mask_token_id is None:
        mask_token_id = family_of(config).mask_token_id
    if not isinstance(mask_token_id, int) or not 0 <= mask_token_id < config.vocab_size:
        raise L2PDError(
            f"the model's config names no mask token: mask_token_id={mask_token_id!r}, "
            f"wanted a token id below vocab_size={config.vocab_size}"
        )
    return mask_token_id


def block_length_of(config: Any) -> int:
    """Positions per block: the config's `block_length` or, as SDAR's code calls it, `block_size`;
    else the family's."""
    named = getattr(config, "block_length", None) or getattr(config, "block_size", None)
    return named or family_of(config).block_length


def end_of_text_ids(value: Any) -> tuple[int, ...]:
    """The end-of-text tokens of an `eos_token_id`: None, a number, a list, or a tensor."""
    if value is None:
        return ()
    found = value.tolist() if hasattr(value, "tolist") else value
    return tuple(found) if isinstance(found, list | tuple) else (found,)
