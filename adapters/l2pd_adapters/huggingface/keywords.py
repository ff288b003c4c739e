"""The keywords of `generate`, their names in other code, and the precedence of settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from l2pd_adapters.families import end_of_text_ids
from l2pd_adapters.huggingface.checking import GENERATE, LOAD, check, close_to, short
from l2pd_adapters.huggingface.option_keywords import as_option, close_option
from l2pd_plugins.errors import L2PDError

logger = logging.getLogger(__name__)

OUR_KEYWORDS = (
    "unmask_policy",
    "unmask_options",
    "block_length",
    "cache",
    "end_of_text",
    "seed",
    "suppress_mask",
    "on_step",
    "observe",
)
_SETTINGS = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "return_dict_in_generate",
)
_INPUTS = ("inputs", "input_ids", "attention_mask", "generation_config", "streamer", "tokenizer")
_IGNORED = ("logits_to_keep", "token_type_ids")
"""Keywords that tokenizers and pipelines pass to every generate; ignored here."""
_NOT_SUPPORTED = (
    "assistant_model",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
)
"""Arguments of transformers' generate that are not settings."""

_CACHES = "cache='prefix' or 'dual' (a block-causal model: 'block', its default)"
_HISTORY = "return_dict_in_generate=True, whose trace says when each token was committed"
_THEIR_WORDS = {
    "prompt": "input_ids",
    "steps": 'unmask_options={"steps": ...}',
    "diffusion_steps": 'unmask_options={"steps": ...}',
    "denoising_steps": 'unmask_options={"steps": ...}',
    "num_to_transfer": 'unmask_options={"tokens_per_step": ...}',
    "gen_length": "max_new_tokens",
    "gen_len": "max_new_tokens",
    "max_gen_toks": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "block_size": "block_length",
    "small_block_size": "block_length",
    "remasking": "unmask_policy ('fixed_schedule' is low_confidence, the default; 'random_order' "
    "is random)",
    "remasking_strategy": "unmask_policy ('fixed_schedule', 'confidence_threshold', ...)",
    "alg": "unmask_policy ('dream_confidence' is maskgit_plus, 'dream_margin' topk_margin, "
    "'dream_entropy' entropy)",
    "alg_temp": 'unmask_options={"alg_temp": ...}, with one of unmask_policy="dream_confidence", '
    '"dream_margin", "dream_entropy"',
    "threshold": 'unmask_policy="confidence_threshold", unmask_options={"threshold": ...}',
    "confidence_threshold": 'unmask_policy="confidence_threshold", '
    'unmask_options={"threshold": ...}',
    "dynamic_threshold": 'unmask_policy="confidence_threshold", unmask_options={"threshold": ...}',
    "factor": 'unmask_policy="fast_dllm_factor", unmask_options={"factor": ...}',
    "eb_threshold": 'unmask_policy="eb_sampler"',
    "use_cache": _CACHES,
    "use_block_cache": _CACHES,
    "dual_cache": "cache='dual'",
    "output_history": _HISTORY,
    "return_history": _HISTORY,
    "generation_logits_hook_func": "on_step, which sees every step",
    "generation_tokens_hook_func": "on_step, which sees every step",
    "eos_early_stop": "end_of_text='block', the default",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
}
"""Keywords of LLaDA's, Dream's, SDAR's, LLaDA2's and Fast-dLLM's own code, and the equivalent
here.
"""
_NOT_HERE = {
    "mask_id": "the mask token is the one of the model's config (mask_token_id)",
    "mask_token_id": "the mask token is the one of the model's config (mask_token_id)",
    "cfg_scale": "classifier-free guidance is not supported; leave it out",
    "cfg": "classifier-free guidance is not supported; leave it out",
    "eps": "Dream's time steps are not used; leave it out",
}
"""Such keywords without an equivalent here."""

_WITHOUT_EFFECT = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "early_stopping": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "synced_gpus": False,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "use_cache": False,
    # A prepared config (custom_generate) contains these defaults of assisted decoding.
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
"""Settings of autoregressive decoding, each with its neutral value. None is always neutral."""

_NOT_SETTINGS = ("transformers_version", "is_assistant", "use_cache")
_TOGETHER = (("max_new_tokens", "max_length"), ("unmask_policy", "unmask_options"))


def refuse_unknown(keywords: Mapping[str, Any], policy: Any = None) -> None:
    """Raise L2PDError for unknown keywords, and for those that diffusion decoding does not support.

    Keywords of other code for such models, and options of policies, are listed in one error, each
    with what to write.

    Args:
        policy: the `unmask_policy` if it is not among the keywords.
    """
    policy = keywords.get("unmask_policy", policy)
    known = {*OUR_KEYWORDS, *_SETTINGS, *_INPUTS, *_IGNORED}
    config_fields = set(GenerationConfig().__dict__) | set(_WITHOUT_EFFECT)
    foreign = {*_THEIR_WORDS, *_NOT_HERE}
    theirs = [
        name
        for name, value in keywords.items()
        if name in foreign and value is not None and not _asks_for_nothing(name, value)
    ]
    if theirs:
        raise L2PDError("; ".join(_in_our_words(name, keywords[name], policy) for name in theirs))
    for name, value in keywords.items():
        if name in known or name in foreign or _asks_for_nothing(name, value):
            continue
        supported = ", ".join((*OUR_KEYWORDS, *_SETTINGS))
        if name in config_fields or name in _NOT_SUPPORTED:
            if value is None:
                continue
            raise L2PDError(
                f"{name}={short(value)} is not supported by diffusion decoding; supported are "
                f"{supported}"
            )
        if name in LOAD:
            raise L2PDError(f"{name}={short(value)}: it is a keyword of load, not of generate")
        option = as_option(name, value, policy)
        if option:
            raise L2PDError(option)
        hint = close_option(name, policy) or close_to(name, known | config_fields) or "."
        raise L2PDError(f"unknown keyword {name!r} (= {short(value)}){hint} Known are {supported}")


def _in_our_words(name: str, value: object, policy: Any) -> str:
    option = "" if policy is None else as_option(name, value, policy, among_others=False)
    if option:
        return option
    told = f"{name}={short(value)}: "
    return told + (_NOT_HERE.get(name) or f"it has another name here; use {_THEIR_WORDS[name]}")


def _asks_for_nothing(name: str, value: object) -> bool:
    if name not in _WITHOUT_EFFECT or not isinstance(value, bool | int | float | str):
        return False
    neutral = _WITHOUT_EFFECT[name]
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def merged_config(
    model: Any, given: GenerationConfig | None, keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings. Precedence: keywords, then `generation_config`, then the model's own config.

    A source that names a length, or a policy, replaces what weaker sources say of either: a
    keyword `max_length` wins over the model's `max_new_tokens`, and a policy does not inherit the
    options of another.
    """
    own = model.generation_config
    merged: dict[str, Any] = {}
    for source in (own, given, keywords):
        values = source.to_dict() if isinstance(source, GenerationConfig) else source or {}
        named = {name: value for name, value in values.items() if value is not None}
        if source is own:  # some checkpoints use -1 for "no such token"
            for name in [n for n in named if n.endswith("_token_id")]:
                ids = end_of_text_ids(named.pop(name))
                if ids:
                    named[name] = ids[0] if len(ids) == 1 else list(ids)
        for together in _TOGETHER:
            if any(name in named for name in together):
                for name in together:
                    merged.pop(name, None)
        for name, value in named.items():
            if source is not own:  # the model's own settings are checked only if they are used
                value = check(GENERATE, name, value)
            if source is keywords or name in (*OUR_KEYWORDS, *_SETTINGS):
                merged[name] = value
            elif name.startswith("_") or name in (*_NOT_SETTINGS, *_IGNORED):
                continue
            elif not _asks_for_nothing(name, value):
                # transformers passes the model's settings to a custom generate as if the user had
                # given them.
                if source is given and getattr(own, name, None) != value:
                    raise L2PDError(
                        f"{name}={short(value)} of the given generation_config is not supported "
                        "by diffusion decoding"
                    )
                logger.warning("the model's generation_config: %s=%r is not used", name, value)
    return merged
