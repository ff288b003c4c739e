"""The settings that a checkpoint's config.json and its like may hold, by type and bounds.

Configs are untrusted. This module checks the settings that this package reads, and every size by
which a library would loop or allocate memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from l2pd_plugins.files import one_line, whole_number

_GREATEST = 2**31 - 1
_LAYERS = 4096
"""The deepest models known have some hundred."""
_CHOICES = 2**16
"""Experts, labels."""
_KINDS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layers",
            "num_layers",
            "num_hidden_layers_override",
            "n_layer",
            "encoder_layers",
            "decoder_layers",
        ),
        (1, _LAYERS),
    ),
    **dict.fromkeys(
        (
            "vocab_size",
            "embedding_size",
            "hidden_size",
            "d_model",
            "n_embd",
            "intermediate_size",
            "mlp_hidden_size",
            "num_attention_heads",
            "n_heads",
            "num_key_value_heads",
            "n_kv_heads",
            "num_global_key_value_heads",
            "head_dim",
            "global_head_dim",
            "max_position_embeddings",
            "max_sequence_length",
            "moe_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "canvas_length",
            "block_size",
            "patch_size",
        ),
        (1, _GREATEST),
    ),
    # Configs of LLaDA2 use 0 for "none".
    "block_length": (0, _GREATEST),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "num_labels", "type_vocab_size"),
        (0, _CHOICES),
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_shared_experts", "n_group", "topk_group", "top_k_experts"),
        (0, _CHOICES),
    ),
    "first_k_dense_replace": (0, _LAYERS),
    # Some configs use -1 for "none".
    **dict.fromkeys(("mask_token_id", "pad_token_id", "bos_token_id"), (-1, _GREATEST)),
}
_TEXTS = ("model_type", "dtype", "torch_dtype", "hidden_act", "quant_method")
_FLAGS = ("tie_word_embeddings", "weight_tying", "is_causal")
_NUMBERS = ("rms_norm_eps", "layer_norm_eps", "rope_theta", "initializer_range")
_OBJECTS = (
    "text_config",
    "vision_config",
    "quantization_config",
    "rope_scaling",
    "rope_parameters",
    "auto_map",
)
_FREE = ("auto_map", "rope_scaling", "rope_parameters")
"""Objects whose contents are not checked, since they are not settings of the above kinds."""


def wrong_settings(values: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with the settings of a config, by the setting: "hidden_size = '64'; expected a
    whole number from 1 to ...". null is always fine: the setting is not given."""
    found = {}
    for name, value in values.items():
        if value is None:
            continue
        expected = _expected(name, value)
        if expected:
            found[name] = f"{name} = {one_line(repr(value))[:80]}; expected {expected}"
        elif isinstance(value, Mapping) and name in _OBJECTS and name not in _FREE:
            inner = wrong_settings(value)
            if inner:
                found[name] = f"{name}.{next(iter(inner.values()))}"
    return found


def _expected(name: str, value: Any) -> str:
    """The expected kind of this setting; empty if the value is valid."""
    if name in _KINDS:
        least, greatest = _KINDS[name]
        fits = whole_number(value, least, greatest)
        return "" if fits else f"a whole number from {least} to {greatest}"
    for names, is_one, expected in _TYPES:
        if name in names and not is_one(value):
            return expected
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_token_ids(value: Any) -> bool:
    ids = value if isinstance(value, list) else [value]
    return all(whole_number(each, -1, _GREATEST) for each in ids)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 1e38 and math.isfinite(value)


_TYPES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_TEXTS, _is_text, "a text"),
    (("architectures",), _is_names, "a list of names"),
    (_FLAGS, lambda value: isinstance(value, bool), "true or false"),
    (_NUMBERS, _is_number, "a number above 0"),
    (_OBJECTS, lambda value: isinstance(value, Mapping), "an object"),
    (("eos_token_id",), _is_token_ids, "a token id or a list of them"),
)
