"""From the arguments of generate to settings that the loop can rely on.

Everything that can be wrong is refused here, by name, before the first forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from l2pd_adapters.families import ModelFamily, end_of_text_ids
from l2pd_adapters.huggingface.checking import (
    DRAWING,
    GENERATE,
    MOST_POSITIONS,
    SEEDS_BELOW,
    Whole,
    check,
    close_to,
    short,
)
from l2pd_adapters.huggingface.forward import CACHES, LOOKING_AHEAD, CacheKind
from l2pd_adapters.huggingface.models.lora import ADAPTER
from l2pd_adapters.huggingface.models.model_info import (
    block_length_of,
    family_of,
    is_masked_lm,
    mask_token_of,
)
from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.denoising import StepOutcome
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.layout import Attention
from l2pd_plugins.plugins import bind_policy
from l2pd_plugins.traits import description_of

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
_IGNORED = ("logits_to_keep", "token_type_ids")
"""What tokenizers and pipelines hand to every generate; it has no meaning here."""
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
"""Arguments of transformers' generate that are no settings."""

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
    "remasking": "unmask_policy ('fixed_schedule' is low-confidence remasking, the default)",
    "remasking_strategy": "unmask_policy ('fixed_schedule', 'confidence_threshold', ...)",
    "alg": "unmask_policy ('fixed_schedule' is maskgit_plus, 'dream_margin' topk_margin, "
    "'dream_entropy' entropy)",
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
"""Keywords of LLaDA's, Dream's, SDAR's, LLaDA2's and Fast-dLLM's own code, and what says the same
here."""
_NOT_HERE = {
    "mask_id": "the mask token is the one of the model's config (mask_token_id)",
    "mask_token_id": "the mask token is the one of the model's config (mask_token_id)",
    "cfg_scale": "classifier-free guidance is not supported; leave it out",
    "cfg": "classifier-free guidance is not supported; leave it out",
    "alg_temp": "which positions are committed is the policy's decision and is not drawn; leave it "
    "out, or take a policy of your own (unmask_policy)",
    "eps": "Dream's time steps are not used; leave it out",
}
"""Such keywords that nothing here stands for."""

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
    "min_p": 0.0,
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
    # A prepared config (custom_generate) carries these defaults of assisted decoding.
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
"""Settings of autoregressive decoding, each with the value that asks for nothing. None asks for
nothing anywhere."""

_NOT_SETTINGS = ("transformers_version", "is_assistant", "use_cache")
_TOGETHER = (("max_new_tokens", "max_length"), ("unmask_policy", "unmask_options"))
_COLD = 1e-3
"""Below this temperature, logits are compared with the largest one of their row."""
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
        if self.temperature < _COLD:
            # Divided by so little, the largest logits would all be infinite, or NaN.
            top = scores.amax(-1, keepdim=True)
            scores = scores - top.masked_fill(top.isinf(), 0.0)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k > 0:
            warpers.append(TopKLogitsWarper(min(self.top_k, scores.shape[1])))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers(None, scores)

    def describe(self, model: Any) -> str:
        """Everything that the result depends on, in one line."""
        policies = list(dict.fromkeys(description_of(policy) for policy in self.policies))
        progress = list(dict.fromkeys(policy.progress for policy in self.policies))
        parts: dict[str, Any] = {
            "model": self.model_name,
            **({"adapter": getattr(model, ADAPTER)} if hasattr(model, ADAPTER) else {}),
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
    """Raise L2PDError for keywords that mean nothing, or that diffusion decoding cannot do.

    Those that other code for such models has are all named at once, each with the word to use.
    """
    known = {*OUR_KEYWORDS, *_SETTINGS, *_INPUTS, *_IGNORED}
    config_fields = set(GenerationConfig().__dict__) | set(_WITHOUT_EFFECT)
    foreign = {*_THEIR_WORDS, *_NOT_HERE}
    theirs = [
        name
        for name, value in keywords.items()
        if name in foreign and value is not None and not _asks_for_nothing(name, value)
    ]
    if theirs:
        raise L2PDError("; ".join(_in_our_words(name, keywords[name]) for name in theirs))
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
        raise L2PDError(
            f"unknown keyword {name!r} (= {short(value)})"
            f"{close_to(name, known | config_fields) or '.'} Known are {supported}"
        )


def _in_our_words(name: str, value: object) -> str:
    told = f"{name}={short(value)}: "
    return told + (_NOT_HERE.get(name) or f"it is called otherwise here; use {_THEIR_WORDS[name]}")


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
        if source is own:  # some checkpoints say -1 where they have no such token
            for name in [n for n in named if n.endswith("_token_id")]:
                ids = end_of_text_ids(named.pop(name))
                if ids:
                    named[name] = ids[0] if len(ids) == 1 else list(ids)
        for together in _TOGETHER:
            if any(name in named for name in together):
                for name in together:
                    merged.pop(name, None)
        for name, value in named.items():
            if source is not own:  # of the model's own, what is used is checked: no one typed it
                value = check(GENERATE, name, value)
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
    merged = {
        key: value if key in DRAWING else check(GENERATE, key, value)
        for key, value in merged.items()
    }
    repeats = merged.get("num_return_sequences", 1)
    family = family_of(model)
    mask_token_id = mask_token_of(model)
    max_new_tokens = _canvas(merged, prompt_length)
    default_block = block_length_of(model)
    block_length = merged.get("block_length", default_block)
    most = max(max_new_tokens, default_block, positions_of(model) or 0)
    if block_length > most:
        raise L2PDError(
            f"block_length={block_length}: expected at most {most}, the canvas "
            f"({max_new_tokens}) or the model's positions, whichever is more"
        )
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

    ids = merged.get("eos_token_id", ())
    vocabulary = model.config.vocab_size
    for token_id in ids:
        _within("eos_token_id", token_id, vocabulary)
        if token_id == mask_token_id:
            raise L2PDError(f"eos_token_id={token_id} is the mask token")
    end_of_text = EndOfText(merged.get("end_of_text", "block"), ids)
    pad_token_id = merged.get("pad_token_id")
    if pad_token_id is None:
        pad_token_id = ids[0] if ids else int(mask_token_id == 0)
    _within("pad_token_id", pad_token_id, vocabulary)
    if pad_token_id == mask_token_id:
        raise L2PDError(f"pad_token_id={pad_token_id} is the mask token, which is never returned")

    check(GENERATE, "streamer", streamer)
    if streamer is not None and batch_size != 1:
        raise L2PDError(f"a streamer takes one sequence, this call makes {batch_size}")
    do_sample = merged.get("do_sample", False)
    seed = merged.get("seed")
    sampling: dict[str, Any] = {}
    if do_sample:
        defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": _TRANSFORMERS_TOP_K}
        sampling = {
            name: check(DRAWING, name, merged.get(name, default))
            for name, default in defaults.items()
        }
    elif merged.get("temperature", 1.0) not in (0, 1):
        logger.warning("temperature=%s has no effect: do_sample is not set", merged["temperature"])

    context = ModelContext(
        name=name,
        block_length=block_length,
        mask_token_id=mask_token_id,
        vocab_size=vocabulary,
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
        suppress_mask=merged.get("suppress_mask", True),
        return_dict=merged.get("return_dict_in_generate", False),
        streamer=streamer,
        on_step=merged.get("on_step"),
        observe=merged.get("observe", frozenset()),
    )


def _canvas(merged: Mapping[str, Any], prompt_length: int) -> int:
    """The canvas's length, by the keyword that names it."""
    if "max_new_tokens" in merged:
        return merged["max_new_tokens"]
    if "max_length" not in merged:
        raise L2PDError("max_new_tokens is not given: the length of the canvas has no default")
    length: int = merged["max_length"]
    if length <= prompt_length:
        raise L2PDError(
            f"max_length={length}: the prompt has {prompt_length} tokens already; expected a "
            "larger number, or max_new_tokens, which counts the canvas alone"
        )
    return length - prompt_length


def _within(name: str, token_id: int, vocabulary: int) -> None:
    if token_id >= vocabulary:
        raise L2PDError(
            f"{name}={token_id}: expected a token id below the model's vocab_size={vocabulary}"
        )


def positions_of(model: Any) -> int | None:
    """How many positions the model was made for; None if its config does not say."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


_TIMES = 16
"""A canvas of more than so many times the model's positions is a mistake, and is not allocated."""
_longest_told: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""Per model, the longest text about which a warning was logged."""


def check_room(
    model: Any, prompt_length: int, max_new_tokens: int, keyword: str = "max_new_tokens"
) -> None:
    """Warn, once for a model and length, if prompt and canvas exceed the model's positions.

    Args:
        keyword: what the user typed for the length of the canvas, "max_length" or this.

    Raises L2PDError if they cannot be decoded at all: a learned embedding has no further
    positions, and a canvas many times as long is not worth allocating.
    """
    length, positions = prompt_length + max_new_tokens, positions_of(model)
    value = length if keyword == "max_length" else max_new_tokens
    told = f"{keyword}={value}: a prompt of {prompt_length} tokens and its canvas take {length}"
    most, why = MOST_POSITIONS, ""
    if positions is not None:
        most, why = min(most, _TIMES * positions), f"{_TIMES} times the model's {positions}"
    learned = _learned_positions(model)
    if learned is not None and learned < most:
        most, why = learned, "those of the model's embedding"
    if length > most:
        raise L2PDError(f"{told} positions; expected at most {most}" + f", {why}" * bool(why))
    if positions is not None and length > max(positions, _longest_told.get(model, 0)):
        _longest_told[model] = length
        logger.warning(
            "%s positions, the model was made for %d: it may answer badly", told, positions
        )


def _learned_positions(model: Any) -> int | None:
    """Positions of an embedding with a weight for each; None if positions are computed."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and last in ("position_embeddings", "wpe"):
            return module.num_embeddings - family_of(model).first_position
    return None


def check_prompts(
    prompts: Tensor,
    mask: Tensor | None,
    *,
    vocabulary: int,
    mask_token_id: int | None,
    pad_token_id: int | None,
    name: str = "input_ids",
) -> None:
    """Check token ids (B, P), of which those count where the mask is not 0.

    Args:
        mask_token_id: None for a model without.
        pad_token_id: what padding is told by where there is no mask; None checks nothing.

    Raises L2PDError for ids outside the vocabulary, for masks among them, and for a batch that was
    padded and comes without its mask.
    """
    seen = torch.ones_like(prompts, dtype=torch.bool) if mask is None else mask != 0
    outside = (prompts < 0) | (prompts >= vocabulary)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise L2PDError(
            f"{name}: {int(prompts[row, column])} at position {column} of prompt {row}; expected "
            f"token ids from 0 to {vocabulary - 1}"
        )
    if mask_token_id is not None:
        masks = (prompts == mask_token_id) & seen
        if bool(masks.any()):
            row = int(masks.any(-1).nonzero()[0])
            begin = int(seen[row].to(torch.int64).argmax())
            refuse_masks(prompts[row, begin:].tolist(), mask_token_id, f"{name}, prompt {row}")
    if mask is None and pad_token_id is not None and pad_token_id < vocabulary:
        _refuse_unmasked_padding(prompts, pad_token_id, name)


def refuse_masks(tokens: list[int], mask_token_id: int, what: str) -> None:
    """Raise L2PDError, with their positions, if there are mask tokens in a prompt."""
    at = [i for i, token in enumerate(tokens) if token == mask_token_id]
    if at:
        some = ", ".join(map(str, at[:_NAMED_AT_MOST])) + (", ..." * (len(at) > _NAMED_AT_MOST))
        raise L2PDError(
            f"{what}: the mask token {mask_token_id} stands at position {some} ({len(at)} in all); "
            "masks inside a prompt are not filled in, only the canvas behind it is; expected a "
            "prompt without masks"
        )


_NAMED_AT_MOST = 5


def _refuse_unmasked_padding(prompts: Tensor, pad_token_id: int, name: str) -> None:
    padding = prompts == pad_token_id
    begins, ends = (
        side.to(torch.int64).cumprod(-1).sum(-1) for side in (padding, padding.flip(-1))
    )
    if int(begins.min()) != int(begins.max()):
        row = int(begins.argmax())
        raise L2PDError(
            f"{name}: prompt {row} begins with {int(begins[row])} times "
            f"pad_token_id={pad_token_id}, others do not, and there is no attention_mask; "
            "pass the tokenizer's attention_mask (all ones if these are not padding)"
        )
    # One such token may be a text's first, or its last; more of them never are.
    most = max(int(begins.max()), int(ends.max()))
    if most > 1 or int(ends.min()) != int(ends.max()):
        logger.warning(
            "%s: prompts begin or end with %d padding token(s) (%d), and there is no "
            "attention_mask: they are read as part of the prompt",
            name,
            most,
            pad_token_id,
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
    options = check(GENERATE, "unmask_options", merged.get("unmask_options")) or {}
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
    if isinstance(seed, list):
        if len(seed) != batch_size:
            raise L2PDError(f"seed names {len(seed)} seeds for {batch_size} sequences")
        return tuple(seed)
    first = int(torch.randint(2**31, ())) if seed is None else seed
    if first + batch_size > SEEDS_BELOW:
        raise L2PDError(
            f"seed={first}: the last of {batch_size} sequences would draw with a seed that is not "
            "below 2**63"
        )
    return tuple(first + i for i in range(batch_size))


def whole(name: str, value: Any, least: int) -> int:
    """The value as an int. Raises L2PDError if it is no whole number from `least` up."""
    number: int = check({name: Whole(least, MOST_POSITIONS)}, name, value)
    return number
