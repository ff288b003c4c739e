"""The model families and how to decode them: one table for all engines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from l2pd_plugins.block_layout import Attention
from l2pd_plugins.errors import L2PDError

CacheKind = Literal["none", "prefix", "dual", "block"]
CACHES: dict[Attention, tuple[CacheKind, ...]] = {
    "bidirectional": ("none", "prefix", "dual"),
    "block_causal": ("block", "none"),
}
"""The cache choices for each kind of attention, the default first."""


@dataclass(frozen=True)
class ModelFamily:
    """The facts that an engine needs to decode a family of diffusion language models.

    The constructor raises L2PDError for a combination that cannot be decoded.
    """

    name: str
    attention: Attention
    model_types: tuple[str, ...] = ()
    """`config.model_type` of its checkpoints."""
    architecture: str | None = None
    """The name in `config.architectures` that distinguishes its checkpoints from others of the same
    `decoder`.
    """
    decoder: str | None = None
    """The native model type with the same architecture, if `model_types` are those of remote code.
    Checkpoints that name the `architecture` may also have it as their model type.
    """
    block_length: int = 32
    """Positions per block if the checkpoint's config names none: the length used in training, or,
    for models trained without blocks, the length that the authors decode with.
    """
    mask_token_id: int | None = None
    """Id of the mask token if the checkpoint's config names none."""
    end_of_text_ids: tuple[int, ...] = ()
    """Ids of tokens that end a text, in addition to those that the checkpoint names."""
    logit_shift: int = 0
    """The logits that predict position i are at position i - `logit_shift`."""
    first_position: int = 0
    """The position id of a text's first token (2 in RoBERTa)."""
    config_names: Mapping[str, str] = field(default_factory=dict)
    """Maps names of settings in the checkpoint's config to those of `decoder`, if they differ."""
    config_fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the checkpoint's config for which `decoder` supports only one value, and this
    value.
    """
    weight_names: tuple[tuple[str, str], ...] = ()
    """Maps prefixes of the checkpoint's weight names to those of `decoder`; `*` stands for the
    number of a layer. Names without such a prefix are the same in both.
    """
    ignored_weights: tuple[str, ...] = ()
    """Weights of the checkpoint that the model does not use, as patterns (`cls.seq_*`)."""
    chat_template: str | None = None
    """Jinja template for tokenizers without one."""

    def __post_init__(self) -> None:
        if self.attention not in get_args(Attention):
            raise L2PDError(
                f"family {self.name!r}: attention={self.attention!r}, the choices are "
                f"{', '.join(get_args(Attention))}"
            )
        for name, least in (("block_length", 1), ("logit_shift", 0), ("first_position", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise L2PDError(
                    f"family {self.name!r}: {name}={value!r}; expected a whole number from {least}"
                )
        if self.logit_shift and self.attention == "block_causal":
            raise L2PDError(
                f"family {self.name!r}: logit_shift={self.logit_shift} with block-causal attention "
                "is not supported: the logits of a block's first position belong to the block "
                "before"
            )

    def native_config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a checkpoint's config.json as `decoder` names them.

        Raises L2PDError if a setting is not supported by `decoder`.
        """
        for name, wanted in self.config_fixed.items():
            if name in values and (values[name] or False) != wanted:  # None means not set
                raise L2PDError(
                    f"{name}={values[name]!r} in the checkpoint's config: {self.name} is decoded "
                    f"with {name}={wanted!r} only"
                )
        native = {
            self.config_names.get(name, name): value
            for name, value in values.items()
            if name not in self.config_fixed
        }
        native.pop("auto_map", None)  # refers to the checkpoint's own code
        if self.decoder is not None:
            native["model_type"] = self.decoder
        if self.architecture is not None:
            native["architectures"] = [self.architecture]
        return native

    @property
    def weight_patterns(self) -> dict[str, str]:
        """`weight_names` as regular expressions and their replacements."""
        return {
            "^" + re.escape(theirs).replace(r"\*", r"(\d+)"): native.replace("*", r"\1")
            for theirs, native in self.weight_names
        }

    def native_weight(self, name: str) -> str:
        """The name of a checkpoint's weight in `decoder`."""
        for pattern, native in self.weight_patterns.items():
            renamed, found = re.subn(rf"{pattern}(?!\w)", native, name)
            if found:
                return renamed
        return name


_LLADA_CONFIG = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}
_LLADA_FIXED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "rope": True,
    "alibi": False,
    "scale_logits": False,
}
_LLADA_CHAT = (
    "{% for message in messages %}"
    "{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message.role "
    "+ '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
_QWEN_CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_ENDS = (151643, 151645)  # <|endoftext|>, <|im_end|>

FAMILIES = (
    ModelFamily(
        name="LLaDA",  # GSAI-ML/LLaDA-8B, arXiv 2502.09992
        model_types=("llada",),
        attention="bidirectional",
        architecture="LLaDAModelLM",
        decoder="llama",
        mask_token_id=126336,
        end_of_text_ids=(126081, 126348),  # <|endoftext|>, <|eot_id|>
        config_names=_LLADA_CONFIG,
        config_fixed=_LLADA_FIXED,
        weight_names=(
            ("model.transformer.wte", "model.embed_tokens"),
            ("model.transformer.ln_f", "model.norm"),
            ("model.transformer.ff_out", "lm_head"),
            *(
                (f"model.transformer.blocks.*.{theirs}", f"model.layers.*.{native}")
                for theirs, native in (
                    ("attn_norm", "input_layernorm"),
                    ("q_proj", "self_attn.q_proj"),
                    ("k_proj", "self_attn.k_proj"),
                    ("v_proj", "self_attn.v_proj"),
                    ("attn_out", "self_attn.o_proj"),
                    ("ff_norm", "post_attention_layernorm"),
                    ("ff_proj", "mlp.gate_proj"),
                    ("up_proj", "mlp.up_proj"),
                    ("ff_out", "mlp.down_proj"),
                )
            ),
        ),
        chat_template=_LLADA_CHAT,
    ),
    ModelFamily(
        name="Dream",  # Dream-org/Dream-v0-7B, arXiv 2508.15487
        model_types=("Dream",),
        attention="bidirectional",
        architecture="DreamModel",
        decoder="qwen2",
        mask_token_id=151666,
        end_of_text_ids=_QWEN_ENDS,
        logit_shift=1,
        config_fixed={"use_mrope": False},
        chat_template=_QWEN_CHAT,
    ),
    ModelFamily(
        name="LLaDA2",  # inclusionAI/LLaDA2.0-mini
        model_types=("llada2_moe",),
        attention="block_causal",
        architecture="LLaDA2MoeModelLM",
        mask_token_id=156895,
    ),
    *(
        ModelFamily(
            name=name,
            model_types=(model_type,),
            attention="block_causal",
            architecture=architecture,
            decoder=decoder,
            block_length=4,
            mask_token_id=151669,
            end_of_text_ids=_QWEN_ENDS,
            chat_template=_QWEN_CHAT,
        )
        for name, model_type, architecture, decoder in (  # JetAstra/SDAR, arXiv 2510.06303
            ("SDAR", "sdar", "SDARForCausalLM", "qwen3"),
            ("SDAR-MoE", "sdar_moe", "SDARMoeForCausalLM", "qwen3_moe"),
        )
    ),
    ModelFamily(
        name="bidirectional decoder",
        model_types=("llama", "qwen3"),
        attention="bidirectional",
    ),
)

DIFFUSION_GEMMA = ModelFamily(
    name="DiffusionGemma",
    model_types=("diffusion_gemma",),
    attention="bidirectional",
    architecture="DiffusionGemmaForBlockDiffusion",
)
"""Not in `FAMILIES`, which are decoded with masks: engines have a separate loop for it, in which a
policy replaces the sampler.
"""
NO_MASK_TOKEN = -1
"""Replaces the mask token id for a model without masks, in `ModelContext` and in
`DenoisingStep.tokens`.
"""


def family_of(config: Any) -> ModelFamily:
    """The family of a model, from its config.

    Raises L2PDError if the config describes no diffusion language model that can be decoded here.
    """
    model_type = getattr(config, "model_type", None)
    architectures = getattr(config, "architectures", None) or ()
    for family in FAMILIES:
        if family.architecture in architectures and model_type == family.decoder:
            return family
        if model_type in family.model_types:
            causal = getattr(config, "is_causal", True) is not False
            if family.attention == "bidirectional" and family.decoder is None and causal:
                raise L2PDError(
                    f"model type {model_type!r} with causal attention is an autoregressive model; "
                    "a diffusion language model on this architecture has is_causal=false in its "
                    f"config, or one of {_named_architectures()} in its architectures"
                )
            return family
    raise L2PDError(
        f"model type {model_type!r} is not supported; known: {', '.join(known_model_types())}. "
        "Another model is described by a family: "
        'ModelFamily(name="mine", attention="bidirectional", mask_token_id=...)'
    )


def known_model_types() -> list[str]:
    """`config.model_type` of the checkpoints that need no `ModelFamily` from the user."""
    return sorted({name for family in FAMILIES for name in family.model_types})


def _named_architectures() -> str:
    return ", ".join(family.architecture for family in FAMILIES if family.architecture)


def mask_token_of(config: Any, family: ModelFamily | None = None) -> int:
    """The id of the mask token: the config's `mask_token_id`, else the family's (None: the config's
    family).

    Raises L2PDError if there is none, or if it is outside the vocabulary.
    """
    mask_token_id = getattr(config, "mask_token_id", None)
    if mask_token_id is None:
        mask_token_id = (family or family_of(config)).mask_token_id
    size = getattr(config, "vocab_size", None) or 0
    if not isinstance(mask_token_id, int) or not 0 <= mask_token_id < size:
        raise L2PDError(
            f"the model's config names no mask token: mask_token_id={mask_token_id!r}; "
            f"expected a token id below vocab_size={size}"
        )
    return mask_token_id


def block_length_of(config: Any, family: ModelFamily | None = None) -> int:
    """Positions per block: the config's `block_length` or, as SDAR's code calls it, `block_size`;
    else the family's (None: the config's family)."""
    named = getattr(config, "block_length", None) or getattr(config, "block_size", None)
    return named or (family or family_of(config)).block_length


def end_of_text_of(config: Any, family: ModelFamily) -> tuple[int, ...]:
    """The family's end-of-text tokens; empty if the config names a different mask token from the
    family's, since the vocabulary then differs.

    Raises L2PDError if one is beyond the vocabulary.
    """
    if family.mask_token_id not in (None, mask_token_of(config, family)):
        return ()
    for token_id in family.end_of_text_ids:
        if not 0 <= token_id < config.vocab_size:
            raise L2PDError(
                f"family {family.name!r}: end_of_text_ids={family.end_of_text_ids}; expected token "
                f"ids below vocab_size={config.vocab_size}"
            )
    return family.end_of_text_ids


def end_of_text_ids(value: Any) -> tuple[int, ...]:
    """The end-of-text tokens of an `eos_token_id`: None, a number, a list, or a tensor."""
    if value is None:
        return ()
    found = value.tolist() if hasattr(value, "tolist") else value
    ids = found if isinstance(found, list | tuple) else (found,)
    return tuple(each for each in ids if each != -1)  # some checkpoints use -1 for "no such token"
