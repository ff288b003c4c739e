"""From the arguments of generate to settings that the loop can rely on.

Everything that can be wrong is refused here, by name, before the first forward pass.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from l2pd_adapters.families import Attention, ModelFamily, end_of_text_ids
from l2pd_adapters.huggingface.described import (
    block_length_of,
    family_of,
    is_masked_lm,
    mask_token_of,
)
from l2pd_adapters.huggingface.forward import CACHES, LOOKING_AHEAD, CacheKind
from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.denoising import StepOutcome
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import bind_policy
from l2pd_plugins.policy import STATISTICS

logger = logging.getLogger(__name__)

PolicyChoice = str | Mapping[str, Any] | UnmaskPolicy
StepObserver = Callable[[list[int], list[int], StepOutcome], None]
"""Called after every denoising step with the sequences that took part (indices into the batch),
the block that each stood in, and what the step did."""

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
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "return_dict_in_generate",
)
_INPUTS = ("inputs", "input_ids", "attention_mask", "generation_config", "streamer", "tokenizer")
_IGNORED = ("use_cache", "logits_to_keep", "token_type_ids")
"""What tokenizers and pipelines hand to every generate; it has no meaning here."""

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
    # A prepared config (custom_generate) carries these defaults of assisted decoding.
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
"""Settings of autoregressive decoding, each with the value that asks for nothing. None asks for
nothing anywhere."""

_NOT_SETTINGS = ("transformers_version", "is_assistant")
_TOGETHER = (("max_new_tokens", "max_length"), ("unmask_policy", "unmask_options"))
_TRANSFORMERS_TOP_K = 50
"""What transformers' sampling uses where nobody says otherwise."""


@dataclass(frozen=True)
class DecodeSettings:
    """Everything about a call of generate that is not the model and the prompt."""

    model_name: str
    family: ModelFamily
    mask_token_id: int
    pad_token_id: int
    max_new_tokens: int
    block_length: int
    end_of_text: EndOfText
    policies: tuple[UnmaskPolicy, ...]
    """One per sequence, bound to the model."""
    seeds: tuple[int, ...] | None
    """One per sequence, for sampling and for policies that draw; None if neither was asked for."""
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """0 for all tokens."""
    top_p: float = 1.0
    cache: CacheKind = "none"
    suppress_mask: bool = True
    return_dict: bool = False
    streamer: Any = None
    on_step: StepObserver | None = None
    observe: frozenset[str] = frozenset()
    """Statistics that on_step is shown beyond what the policies require."""

    @property
    def filler(self) -> int:
        """What a reference holds where nothing is known: an end of text, if there is one."""
        return (self.end_of_text.token_ids or (self.pad_token_id,))[0]

    @property
    def looks_ahead(self) -> bool:
        """Whether policies that look ahead can: the logits of later blocks are at hand."""
        return self.family.attention == "bidirectional" and self.cache in LOOKING_AHEAD

    def warp(self, scores: Tensor) -> Tensor:
        """Rows of float32 logits as sampling sees them: temperature, then top-k, then top-p."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k > 0:
            warpers.append(TopKLogitsWarper(min(self.top_k, scores.shape[1])))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers(None, scores)

    def describe(self, model: Any) -> str:
        """Everything that the result depends on, in one line."""
        policies = list(dict.fromkeys(policy.describe() for policy in self.policies))
        progress = list(dict.fromkeys(policy.progress for policy in self.policies))
        parts: dict[str, Any] = {
            "model": self.model_name,
            "policy": policies[0] if len(policies) == 1 else "[" + ", ".join(policies) + "]",
            "progress": ",".join(progress),
            "max_new_tokens": self.max_new_tokens,
            "block_length": self.block_length,
            "cache": self.cache,
            **self._described_ahead(),
            "end_of_text": self.end_of_text.rule,
            "eos": ",".join(map(str, self.end_of_text.token_ids)) or "none",
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        parts["decoding"] = "greedy"
        if self.do_sample:
            parts["decoding"] = (
                f"sampled(temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p})"
            )
        if self.seeds is not None:
            parts["seed"] = self.seeds[0] if len(self.seeds) == 1 else list(self.seeds)
        if not self.suppress_mask:
            parts["suppress_mask"] = False
        return " ".join(f"{key}={value}" for key, value in parts.items())

    def _described_ahead(self) -> dict[str, Any]:
        wanted = any("ahead" in policy.requires for policy in self.policies)
        return {"looks_ahead": self.looks_ahead} if wanted else {}


def refuse_unknown(keywords: Mapping[str, Any]) -> None:
    """Raise L2PDError for keywords that mean nothing, or that diffusion decoding cannot do."""
    known = {*OUR_KEYWORDS, *_SETTINGS, *_INPUTS, *_IGNORED}
    config_fields = set(GenerationConfig().__dict__) | set(_WITHOUT_EFFECT)
    for name, value in keywords.items():
        if name in known or value is None or _asks_for_nothing(name, value):
            continue
        if name in config_fields or name in (
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
        ):
            raise L2PDError(
                f"{name}={short(value)} is not supported by diffusion decoding; supported are "
                f"{', '.join((*OUR_KEYWORDS, *_SETTINGS))}"
            )
        close = difflib.get_close_matches(name, sorted(known | config_fields), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise L2PDError(
            f"unknown keyword {name!r} (= {short(value)}){hint} Known are "
            f"{', '.join((*OUR_KEYWORDS, *_SETTINGS))}"
        )


def _asks_for_nothing(name: str, value: object) -> bool:
    return name in _WITHOUT_EFFECT and value == _WITHOUT_EFFECT[name]


def short(value: object) -> str:
    """The value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} object"


def merged_config(
    model: Any, given: GenerationConfig | None, keywords: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings in transformers' order: keywords win over the config given, it over the model's own.

    A source that names a length, or a policy, replaces what weaker sources say of either: a
    keyword `max_length` wins over the model's `max_new_tokens`, and a policy does not inherit the
    options of another.
    """
    own = model.generation_config
    merged: dict[str, Any] = {}
    for source in (own, given, keywords):
        values = source.to_dict() if isinstance(source, GenerationConfig) else source or {}
        named = {name: value for name, value in values.items() if value is not None}
        for together in _TOGETHER:
            if any(name in named for name in together):
                for name in together:
                    merged.pop(name, None)
        for name, value in named.items():
            if source is keywords or name in (*OUR_KEYWORDS, *_SETTINGS):
                merged[name] = value
            elif name.startswith("_") or name in (*_NOT_SETTINGS, *_IGNORED):
                continue
            elif not _asks_for_nothing(name, value):
                # transformers hands a custom generate the model's settings as if they were given.
                if source is given and getattr(own, name, None) != value:
                    raise L2PDError(
                        f"{name}={short(value)} of the given generation_config is not supported "
                        "by diffusion decoding"
                    )
                logger.warning("the model's generation_config: %s=%r is not used", name, value)
    return merged


def make_settings(
    model: Any,
    prompt_length: int,
    batch_size: int,
    merged: Mapping[str, Any],
    *,
    name: str,
    streamer: Any = None,
) -> DecodeSettings:
    """Check and complete the merged settings for `batch_size` sequences, which are
    `num_return_sequences` adjacent ones for each prompt."""
    repeats = merged.get("num_return_sequences", 1)
    family = family_of(model)
    mask_token_id = mask_token_of(model)
    max_new_tokens = merged.get("max_new_tokens")
    if max_new_tokens is None and "max_length" in merged:
        max_new_tokens = whole("max_length", merged["max_length"], 1) - prompt_length
    if max_new_tokens is None:
        raise L2PDError("max_new_tokens is not given: the length of the canvas has no default")
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    default_block = block_length_of(model)
    block_length = whole("block_length", merged.get("block_length", default_block), 1)
    cache = _cache(merged.get("cache"), model, family)
    implementation = getattr(model.config, "_attn_implementation", None) or "eager"
    if implementation not in ("eager", "sdpa"):
        if family.attention == "block_causal":
            raise L2PDError(
                f"a block-causal model with attn_implementation={implementation!r} is not "
                "supported; load it with eager or sdpa"
            )
        if cache != "none":
            raise L2PDError(
                f"cache={cache!r} with attn_implementation={implementation!r} is not supported; "
                "load the model with eager or sdpa, or decode with cache='none'"
            )

    ids = end_of_text_ids(merged.get("eos_token_id"))
    for token_id in ids:
        whole("eos_token_id", token_id, 0)
        if token_id == mask_token_id:
            raise L2PDError(f"eos_token_id={token_id} is the mask token")
    end_of_text = EndOfText(merged.get("end_of_text", "block"), ids)
    pad_token_id = merged.get("pad_token_id")
    if isinstance(pad_token_id, Tensor):
        pad_token_id = int(pad_token_id)
    if pad_token_id is None:
        pad_token_id = ids[0] if ids else 0
    if pad_token_id == mask_token_id:
        raise L2PDError(f"pad_token_id={pad_token_id} is the mask token, which is never returned")

    if streamer is not None and batch_size != 1:
        raise L2PDError(f"a streamer takes one sequence, this call makes {batch_size}")
    do_sample = merged.get("do_sample", False)
    if not isinstance(do_sample, bool):
        raise L2PDError(f"do_sample={do_sample!r}: wanted True or False")
    seed = merged.get("seed")
    sampling: dict[str, Any] = {}
    if do_sample:
        sampling["temperature"] = _number("temperature", merged.get("temperature", 1.0), above=0.0)
        sampling["top_p"] = _number("top_p", merged.get("top_p", 1.0), above=0.0, at_most=1.0)
        sampling["top_k"] = whole("top_k", merged.get("top_k", _TRANSFORMERS_TOP_K), 0)
    elif merged.get("temperature", 1.0) not in (0, 1):
        logger.warning("temperature=%s has no effect: do_sample is not set", merged["temperature"])

    context = ModelContext(
        name=name,
        block_length=block_length,
        mask_token_id=mask_token_id,
        vocab_size=model.config.vocab_size,
        path=local_folder(model.config),
    )
    return DecodeSettings(
        model_name=name,
        family=family,
        mask_token_id=mask_token_id,
        pad_token_id=pad_token_id,
        max_new_tokens=max_new_tokens,
        block_length=block_length,
        end_of_text=end_of_text,
        policies=bound_policies(merged, batch_size, repeats, context),
        seeds=_seeds(seed, batch_size) if do_sample or seed is not None else None,
        do_sample=do_sample,
        **sampling,
        cache=cache,
        suppress_mask=bool(merged.get("suppress_mask", True)),
        return_dict=bool(merged.get("return_dict_in_generate", False)),
        streamer=streamer,
        on_step=merged.get("on_step"),
        observe=_observed(merged.get("observe", ())),
    )


def local_folder(config: Any) -> str | None:
    """The folder that the model was loaded from, if it was one."""
    path = getattr(config, "_name_or_path", None)
    return path if path and Path(path).is_dir() else None


_WHY_NOT: dict[Attention, str] = {
    "bidirectional": "in a bidirectional model a finished block still depends on what follows it",
    "block_causal": "in a block-causal model the keys and values of finished blocks are final, and "
    "what is behind a block is not seen",
}


def _cache(choice: Any, model: Any, family: ModelFamily) -> CacheKind:
    """The cache, checked; the family's default for None."""
    if is_masked_lm(model):
        if choice not in (None, "none"):
            raise L2PDError(
                f"cache={choice!r}: {type(model).__name__} keeps no keys and values; the choice is "
                "none"
            )
        return "none"
    choices = CACHES[family.attention]
    if choice is None:
        return choices[0]
    for known in choices:
        if choice == known:
            return known
    named = any(choice in others for others in CACHES.values())
    reason = f" ({_WHY_NOT[family.attention]})" if named else ""
    raise L2PDError(f"cache={choice!r}: the choices of this model are {', '.join(choices)}{reason}")


def bound_policies(
    merged: Mapping[str, Any], batch_size: int, repeats: int, context: ModelContext
) -> tuple[UnmaskPolicy, ...]:
    """One policy per sequence; equal choices share one object, so that they form one group."""
    choice = merged.get("unmask_policy", "fixed_schedule")
    options = merged.get("unmask_options") or {}
    if not isinstance(options, Mapping):
        raise L2PDError(f"unmask_options={options!r} is no mapping of option names to values")
    if not isinstance(choice, list | tuple):
        policy = bind_policy(create_policy(choice, **options), context)
        return (policy,) * batch_size
    if options:
        raise L2PDError(
            "unmask_options goes with a single unmask_policy; in a list, give each policy its own "
            'options: {"name": ..., option: value}'
        )
    prompts = batch_size // repeats
    if len(choice) != prompts:
        raise L2PDError(f"unmask_policy names {len(choice)} policies for {prompts} prompts")
    made: dict[str | int, UnmaskPolicy] = {}

    def bound(item: PolicyChoice) -> UnmaskPolicy:
        key = id(item) if isinstance(item, UnmaskPolicy) else repr(item)
        if key not in made:
            made[key] = bind_policy(create_policy(item), context)
        return made[key]

    return tuple(bound(item) for item in choice for _ in range(repeats))


def _seeds(seed: Any, batch_size: int) -> tuple[int, ...]:
    """One seed per sequence, so that what a sequence draws does not depend on its batch.

    A list gives each sequence its own. One number s gives s, s + 1, ...; no number draws s from
    torch's global generator, which ``torch.manual_seed`` and ``transformers.set_seed`` set.
    """
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != batch_size:
            raise L2PDError(f"seed names {len(seed)} seeds for {batch_size} sequences")
        seeds = [whole("seed", item, 0) for item in seed]
    else:
        first = int(torch.randint(2**31, ())) if seed is None else whole("seed", seed, 0)
        seeds = [first + i for i in range(batch_size)]
    if max(seeds) >= 2**63:
        raise L2PDError(f"seed={max(seeds)}: wanted a number below 2**63")
    return tuple(seeds)


def _observed(names: Any) -> frozenset[str]:
    choices = STATISTICS - {"reference"}
    if isinstance(names, str) or not isinstance(names, Iterable) or not set(names) <= choices:
        raise L2PDError(f"observe={names!r}: wanted names out of {', '.join(sorted(choices))}")
    return frozenset(names)


def whole(name: str, value: Any, least: int) -> int:
    """The value as an int. Raises L2PDError if it is no whole number from `least` up."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise L2PDError(f"{name}={value!r}: wanted a whole number from {least}")
    return int(value)


def _number(name: str, value: Any, *, above: float, at_most: float | None = None) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else above
    if not number > above or (at_most is not None and number > at_most):
        limit = "" if at_most is None else f", at most {at_most}"
        raise L2PDError(f"{name}={value!r}: wanted a number above {above}{limit}")
    return number
