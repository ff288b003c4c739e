"""Converts the arguments of `generate` to checked settings for the loop.

Every invalid argument is refused here, by name, before the first forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from l2pd_adapters.families import CACHES, CacheKind, ModelFamily
from l2pd_adapters.huggingface.checking import (
    DRAWING,
    GENERATE,
    MOST_POSITIONS,
    SEEDS_BELOW,
    Whole,
    check,
)
from l2pd_adapters.huggingface.forward import LOOKING_AHEAD
from l2pd_adapters.huggingface.models.lora import ADAPTER
from l2pd_adapters.huggingface.models.model_info import (
    block_length_of,
    family_of,
    is_masked_lm,
    local_folder,
    mask_token_of,
    positions_of,
)
from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.block_layout import Attention
from l2pd_plugins.denoising import StepOutcome
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import bind_policy
from l2pd_plugins.policy_attributes import description_of
from l2pd_plugins.resources import Resources
from l2pd_plugins.sampling import Sampling

logger = logging.getLogger(__name__)

PolicyChoice = str | Mapping[str, Any] | UnmaskPolicy
StepObserver = Callable[[list[int], list[int], StepOutcome], None]
"""Called after every denoising step with the sequences that took part (indices into the batch), the
current block of each, and the outcome of the step.
"""

_TRANSFORMERS_TOP_K = 50
"""The default of transformers' sampling."""
_NEUTRAL = {
    "temperature": (0, 1),
    "top_k": (0, _TRANSFORMERS_TOP_K),
    "top_p": (1,),
    "min_p": (0,),
}
"""Values of the settings of sampling with which a greedy decode asks for nothing."""


@dataclass(frozen=True)
class ModelReading:
    """How the model is run."""

    name: str
    """The model's name in the configuration line."""
    family: ModelFamily
    mask_token_id: int
    suppress_mask: bool = True
    """Whether the mask token is never predicted."""
    cache: CacheKind = "none"

    @property
    def looks_ahead(self) -> bool:
        """Whether policies can look ahead: the logits of later blocks are available."""
        return self.family.attention == "bidirectional" and self.cache in LOOKING_AHEAD


@dataclass(frozen=True)
class Canvas:
    """The canvas and its end-of-text rule."""

    max_new_tokens: int
    block_length: int
    end_of_text: EndOfText
    pad_token_id: int

    @property
    def filler(self) -> int:
        """The token that fills unknown positions of a reference: an end-of-text token, if there is
        one.
        """
        return (self.end_of_text.token_ids or (self.pad_token_id,))[0]


@dataclass(frozen=True)
class Observers:
    """Callbacks that observe the decode."""

    streamer: Any = None
    on_step: StepObserver | None = None
    statistics: frozenset[str] = frozenset()
    """Statistics for on_step, in addition to those that the policies require."""


@dataclass(frozen=True)
class DecodeSettings:
    """All settings of a call of `generate`: everything except the model's weights and the
    prompt.
    """

    model: ModelReading
    canvas: Canvas
    policies: tuple[UnmaskPolicy, ...]
    """One per sequence, bound to the model."""
    sampling: tuple[Sampling, ...] | None = None
    """One per sequence, equal in all but the seed; None for greedy decoding."""
    seeds: tuple[int, ...] | None = None
    """One seed per sequence, for policies that draw; None if neither a seed nor sampling is
    wanted.
    """
    observers: Observers = Observers()
    return_dict: bool = False

    def describe(self, model: Any) -> str:
        """Everything that the result depends on, in one line."""
        policies = list(dict.fromkeys(description_of(policy) for policy in self.policies))
        progress = list(dict.fromkeys(policy.progress for policy in self.policies))
        canvas, end_of_text, sampling = self.canvas, self.canvas.end_of_text, self.sampling
        parts: dict[str, Any] = {"model": self.model.name}
        if hasattr(model, ADAPTER):
            parts["adapter"] = getattr(model, ADAPTER)
        parts |= {
            "policy": policies[0] if len(policies) == 1 else "[" + ", ".join(policies) + "]",
            "progress": ",".join(progress),
            "max_new_tokens": canvas.max_new_tokens,
            "block_length": canvas.block_length,
            "cache": self.model.cache,
        }
        if any("ahead" in policy.requires for policy in self.policies):
            parts["looks_ahead"] = self.model.looks_ahead
        parts |= {
            "end_of_text": end_of_text.rule,
            "eos": ",".join(map(str, end_of_text.token_ids)) or "none",
            "dtype": str(model.dtype).removeprefix("torch."),
            "decoding": "greedy",
        }
        if sampling is not None:
            parts["decoding"] = sampling[0].describe()
        if self.seeds is not None:
            parts["seed"] = self.seeds[0] if len(self.seeds) == 1 else list(self.seeds)
        if not self.model.suppress_mask:
            parts["suppress_mask"] = False
        return " ".join(f"{key}={value}" for key, value in parts.items())


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
    max_new_tokens = _canvas_length(merged, prompt_length)
    block_length = _block_length(merged, model, max_new_tokens)
    cache = _cache(merged.get("cache"), model, family)
    _check_attention_code(model, family, cache)
    canvas = Canvas(
        max_new_tokens, block_length, *_ends(merged, mask_token_id, model.config.vocab_size)
    )
    check(GENERATE, "streamer", streamer)
    if streamer is not None and batch_size != 1:
        raise L2PDError(f"a streamer takes one sequence, but this call makes {batch_size}")
    sampled, seed = _sampling(merged, model.generation_config), merged.get("seed")
    seeds = None if sampled is None and seed is None else _seeds(seed, batch_size)
    context = ModelContext(
        name=name,
        block_length=block_length,
        mask_token_id=mask_token_id,
        vocab_size=model.config.vocab_size,
        path=local_folder(model.config),
    )
    suppress_mask = merged.get("suppress_mask", True)
    return DecodeSettings(
        model=ModelReading(name, family, mask_token_id, suppress_mask, cache),
        canvas=canvas,
        policies=bound_policies(merged, batch_size, repeats, context),
        sampling=None
        if sampled is None
        else tuple(Sampling(each, **sampled) for each in seeds or ()),
        seeds=seeds,
        observers=Observers(streamer, merged.get("on_step"), merged.get("observe", frozenset())),
        return_dict=merged.get("return_dict_in_generate", False),
    )


def _sampling(merged: Mapping[str, Any], own: GenerationConfig) -> dict[str, Any] | None:
    """The settings of sampling except the seed, or None for greedy decoding, with a warning if one
    of them has no effect.
    """
    if not merged.get("do_sample", False):
        idle = [
            f"{name}={merged[name]}"
            for name, neutral in _NEUTRAL.items()
            # What equals the model's own settings is no wish of the user.
            if merged.get(name) not in (None, getattr(own, name, None), *neutral)
        ]
        if idle:
            logger.warning("%s: without effect, since do_sample is not set", ", ".join(idle))
        return None
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": _TRANSFORMERS_TOP_K, "min_p": 0.0}
    return {
        name: check(DRAWING, name, merged.get(name, default)) for name, default in defaults.items()
    }


def _block_length(merged: Mapping[str, Any], model: Any, max_new_tokens: int) -> int:
    default = block_length_of(model)
    block_length: int = merged.get("block_length", default)
    most = max(max_new_tokens, default, positions_of(model) or 0)
    if block_length > most:
        raise L2PDError(
            f"block_length={block_length}: expected at most {most}, the canvas "
            f"({max_new_tokens}) or the model's positions, whichever is more"
        )
    return block_length


def _check_attention_code(model: Any, family: ModelFamily, cache: CacheKind) -> None:
    """Raise L2PDError if the model's attention implementation does not support these settings."""
    implementation = getattr(model.config, "_attn_implementation", None) or "eager"
    if implementation in ("eager", "sdpa"):
        return
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


def _ends(merged: Mapping[str, Any], mask_token_id: int, vocabulary: int) -> tuple[EndOfText, int]:
    """The end-of-text rule, and the token that pads shorter answers."""
    ids = merged.get("eos_token_id", ())
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
    return end_of_text, pad_token_id


def _canvas_length(merged: Mapping[str, Any], prompt_length: int) -> int:
    """The length of the canvas, from max_new_tokens or max_length."""
    if "max_new_tokens" in merged:
        return merged["max_new_tokens"]
    if "max_length" not in merged:
        raise L2PDError("max_new_tokens is not given: the length of the canvas has no default")
    length: int = merged["max_length"]
    if length <= prompt_length:
        raise L2PDError(
            f"max_length={length}: the prompt has {prompt_length} tokens already; expected a "
            "larger number, or max_new_tokens, which counts only the canvas"
        )
    return length - prompt_length


def _within(name: str, token_id: int, vocabulary: int) -> None:
    if token_id >= vocabulary:
        raise L2PDError(
            f"{name}={token_id}: expected a token id below the model's vocab_size={vocabulary}"
        )


_WHY_NOT: dict[Attention, str] = {
    "bidirectional": "in a bidirectional model a finished block still depends on what follows it",
    "block_causal": "in a block-causal model the keys and values of finished blocks are final, and "
    "later blocks are not attended to",
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

    with Resources().in_use():  # one file that many of them name is read once, and is one object
        return tuple(bound(item) for item in choice for _ in range(repeats))


def _seeds(seed: Any, batch_size: int) -> tuple[int, ...]:
    """One seed per sequence, so that a sequence's draws do not depend on its batch.

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
    """The value as an int. Raises L2PDError if it is not a whole number of at least `least`."""
    number: int = check({name: Whole(least, MOST_POSITIONS)}, name, value)
    return number
