"""DiffusionGemma: transformers' own loop, in which an unmask policy replaces the sampler.

transformers decodes this model natively and without masks. A canvas starts as random tokens, each
step draws a token for every position, a sampler accepts some of them, and the others are replaced
by noise. Accepted tokens are not final: the next step decides about the whole canvas again, and the
answer is the model's argmax once it is stable. So a policy sees every position as masked at every
step, and the positions that it selects are accepted. The model still controls temperature, noise
and the end of a canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DiffusionGemmaForBlockDiffusion, GenerationConfig
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSampler,
)

from l2pd_adapters.diffusion_gemma import refuse_unsuitable_policy
from l2pd_adapters.families import NO_MASK_TOKEN, ModelFamily, end_of_text_ids
from l2pd_adapters.huggingface.cache_names import CACHE, CACHE_NAMES
from l2pd_adapters.huggingface.checking import GENERATE, checked, close_to, short
from l2pd_adapters.huggingface.keywords import OUR_KEYWORDS
from l2pd_adapters.huggingface.models.model_info import local_folder
from l2pd_adapters.huggingface.option_keywords import as_option
from l2pd_adapters.huggingface.output import DiffusionGenerateOutput
from l2pd_adapters.huggingface.settings import bound_policies
from l2pd_plugins import ModelContext, UnmaskPolicy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText, is_end_of_text
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.policy_attributes import description_of

_POLICY = ("unmask_policy", "unmask_options")
_INPUTS = (
    "logits_processor",
    "stopping_criteria",
    "pixel_values",
    "image_position_ids",
    "mm_token_type_ids",
    "decoder_input_ids",
    "self_conditioning_logits",
)
"""Arguments of transformers' loop in addition to prompts, streamer, cache and settings."""

_CHECKED = {
    name: GENERATE[name]
    for name in (*_POLICY, "max_new_tokens", "max_length", "return_dict_in_generate", "do_sample")
}
"""Settings that are checked here; transformers checks its own."""

_WHY_NOT = {
    "block_length": "the block is the model's canvas (config.canvas_length)",
    "cache": "its prompt is always cached; cache_implementation says how",
    "end_of_text": "transformers cuts its canvases after an end of text",
    "seed": "transformers draws from torch's generator; call torch.manual_seed before",
    "suppress_mask": "there is no mask token",
    "on_step": "its steps commit nothing permanently",
    "observe": "its steps commit nothing permanently",
}
_COMPILED = (
    "_compiled_accept_canvas",
    "_compiled_renoise_canvas",
    "_compiled_diffusion_stopping_criteria",
)
"""The attributes in which the model caches its compiled sampler and stopping criterion."""


@dataclass
class DiffusionGemmaOutput(DiffusionGenerateOutput):
    """The result, for B sequences. `nfe` counts passes of the decoder, without the encoder's one
    pass for each canvas; `trace` is None.
    """

    cache: Any = None
    """The cache of keys and values, from which decoding can continue."""

    @property
    def past_key_values(self) -> Any:
        """`cache` under the name that it has in transformers before 5.24."""
        return self.cache


class PolicySampler(EntropyBoundSampler):
    """A sampler in which policies decide which tokens are accepted.

    policies: one per sequence, bound to the model.
    """

    def __init__(self, stock: EntropyBoundSampler, policies: tuple[UnmaskPolicy, ...]) -> None:
        self.__dict__.update(stock.__dict__)
        self.policies = policies
        self.block: BlockBatch | None = None
        """The canvas that is being denoised; None before its first step."""

    def initialize_canvas(self, batch_size: int, device: torch.device) -> torch.LongTensor:
        """(B, L) random tokens: a new canvas."""
        self.block = None
        return super().initialize_canvas(batch_size, device)

    def renoise_canvas(self, accepted_canvas: Any, cur_step: Any) -> torch.LongTensor:
        """(B, L) the canvas with noise wherever nothing was accepted."""
        block = self.block
        noisy = super().renoise_canvas(accepted_canvas, cur_step)
        self.block = block  # noise is drawn like a new canvas, but does not begin one
        return noisy

    def accept_canvas(
        self, current_canvas: Tensor, denoiser_canvas: Tensor, logits: Tensor, cur_step: Any
    ) -> Any:
        """(B, L) the canvas with the drawn tokens where the policies accept them.

        Raises PolicyRuntimeError if a policy fails.
        """
        unknown = torch.full_like(current_canvas, NO_MASK_TOKEN)
        if self.block is None:
            self.block = BlockBatch.start(unknown, self.policies, mask_token_id=NO_MASK_TOKEN)
        self.block.set_tokens(unknown)
        outcome = denoising_step(
            self.block,
            logits,
            end_of_text=EndOfText("off", ()),
            x0=denoiser_canvas.flatten(),
            suppress_mask=False,
        )
        self.accepted_token_mask = outcome.committed
        return torch.where(outcome.committed, denoiser_canvas, current_canvas)


def decodes(model: Any) -> bool:
    """Whether the model is one that this module decodes."""
    return isinstance(model, DiffusionGemmaForBlockDiffusion)


def cache_of(keywords: Mapping[str, Any]) -> Cache | None:
    """The cache that decoding continues from, under either of transformers' names; None if none.

    `cache` with any other value is a setting of other models. Raises L2PDError if
    `past_key_values` has another value.
    """
    old = keywords.get("past_key_values")
    if not isinstance(old, Cache | None):
        raise L2PDError(f"past_key_values={short(old)}: expected a Cache of transformers")
    new = keywords.get("cache")
    return new if isinstance(new, Cache) else old


def refuse_family(family: ModelFamily | None) -> None:
    """Raise L2PDError if a family is given: transformers decodes this model itself."""
    if family is not None:
        raise L2PDError(
            f"family {family.name!r}: DiffusionGemma is decoded by transformers' own loop, which "
            "takes no family"
        )


def generate(
    model: Any,
    prompts: Tensor,
    mask: Tensor | None,
    given: GenerationConfig | None,
    streamer: Any,
    keywords: Mapping[str, Any],
    *,
    name: str,
) -> Tensor | DiffusionGemmaOutput:
    """Decode prompts (B, P) in transformers' own loop; mask is (B, P) or None.

    Without `unmask_policy`, exactly as transformers does.

    Raises L2PDError, before any forward pass, for keywords that this model does not support and for
    policies that cannot run on it.
    """
    if not isinstance(given, DiffusionGemmaGenerationConfig | None):
        raise L2PDError(
            f"generation_config is a {type(given).__name__}; expected "
            "DiffusionGemmaGenerationConfig"
        )
    cache = cache_of(keywords)
    keywords = {k: v for k, v in keywords.items() if k not in CACHE_NAMES or v is not cache}
    _refuse_unknown(keywords)
    keywords = {
        **keywords,
        **checked(_CHECKED, {k: keywords[k] for k in _CHECKED if k in keywords}),
    }
    wanted, theirs = _split(model, given, keywords)
    if mask is not None:
        theirs["attention_mask"] = mask
    if cache is not None:
        theirs[CACHE] = cache
    context = ModelContext(
        name=name,
        block_length=model.config.canvas_length,
        mask_token_id=NO_MASK_TOKEN,
        vocab_size=model.config.text_config.vocab_size,
        path=local_folder(model.config),
    )
    policies = None
    if wanted.get("unmask_policy") is not None:
        policies = bound_policies(wanted, len(prompts), 1, context)
        for policy in policies:
            refuse_unsuitable_policy(policy)
    try:
        settings, _ = model._prepare_generation_config(given, **theirs)
    except (TypeError, ValueError) as error:
        raise L2PDError(f"DiffusionGemma's settings: {error}") from error
    with _run_by(model, policies) as passes:
        out = type(model).generate(
            model, prompts, streamer=streamer, generation_config=given, **theirs
        )
    if isinstance(out, Tensor):
        return out
    nfe = passes[0].to(torch.int64)
    length = _lengths(out.sequences[:, prompts.shape[1] :], end_of_text_ids(settings.eos_token_id))
    return DiffusionGemmaOutput(
        sequences=out.sequences,
        nfe=nfe,
        tokens_per_forward=length / nfe.clamp(min=1),
        configuration=_describe(model, name, policies, settings),
        cache=out[CACHE],
    )


def _refuse_unknown(keywords: Mapping[str, Any]) -> None:
    """Raise L2PDError for keywords that this model does not support."""
    settings = [name for name in vars(DiffusionGemmaGenerationConfig()) if name[0] != "_"]
    known = [*_POLICY, *_INPUTS, CACHE, *settings]
    for keyword, value in keywords.items():
        if (keyword in known and keyword not in CACHE_NAMES) or value is None:
            continue
        told = f"{keyword}={short(value)} is not supported by DiffusionGemma"
        if keyword in OUR_KEYWORDS:
            raise L2PDError(f"{told}: {_WHY_NOT[keyword]}")
        option = as_option(keyword, value, keywords.get("unmask_policy"))
        if option:
            raise L2PDError(option)
        hint = close_to(keyword, known) or "."
        raise L2PDError(f"{told}{hint} Known are {', '.join(known)}")


def _split(
    model: Any, given: Any, keywords: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the keywords into those for the policy and those for transformers.

    A policy may also be in a generation_config; it never inherits the options of another policy.
    """
    theirs = {k: v for k, v in keywords.items() if k not in OUR_KEYWORDS and v is not None}
    configs = [vars(config) for config in (given, model.generation_config) if config is not None]
    for source in (keywords, *configs):
        wanted = {name: source[name] for name in _POLICY if source.get(name) is not None}
        if wanted:
            return wanted, theirs
    return {}, theirs


@contextmanager
def _run_by(model: Any, policies: tuple[UnmaskPolicy, ...] | None) -> Iterator[list[Tensor]]:
    """Context manager: replaces the model's sampler by these policies; None leaves it unchanged.

    Yields a list that afterwards contains the decoder's passes for each sequence.
    """
    passes: list[Tensor] = []
    kind = type(model)

    def count(input_ids: Tensor, decoder_forward_passes: Tensor, *args: Any) -> Tensor:
        passes.append(decoder_forward_passes)
        return kind._compute_tokens_per_forward(input_ids, decoder_forward_passes, *args)

    def prepare(generation_config: DiffusionGemmaGenerationConfig) -> PolicySampler:
        sampler = PolicySampler(kind._prepare_sampler(model, generation_config), policies or ())
        # With a static cache the model would compile these and use them in all later calls, with
        # any policy. A policy is not compiled.
        model._compiled_accept_canvas = sampler.accept_canvas
        model._compiled_renoise_canvas = sampler.renoise_canvas
        return sampler

    model._compute_tokens_per_forward = count
    if policies is not None:
        _forget_compiled(model)
        model._prepare_sampler = prepare
    try:
        yield passes
    finally:
        del model._compute_tokens_per_forward
        if policies is not None:
            del model._prepare_sampler
            _forget_compiled(model)


def _forget_compiled(model: Any) -> None:
    for name in _COMPILED:
        model.__dict__.pop(name, None)


def _lengths(answers: Tensor, end_ids: tuple[int, ...]) -> Tensor:
    """(B,) tokens of the answers (B, N), up to and including the end of text."""
    ends = is_end_of_text(answers, end_ids)
    first = ends.to(torch.int64).argmax(-1) + 1
    return torch.where(ends.any(-1), first, answers.shape[1])


def _describe(
    model: Any, name: str, policies: tuple[UnmaskPolicy, ...] | None, settings: Any
) -> str:
    """Everything that the result depends on, except torch's generator, in one line."""
    rules = dict.fromkeys(description_of(policy) for policy in policies or ())
    if policies is None:
        rules = dict.fromkeys([f"entropy_bound({settings.sampler_config.entropy_bound})"])
    parts = {
        "model": name,
        "policy": next(iter(rules)) if len(rules) == 1 else "[" + ", ".join(rules) + "]",
        "progress": ",".join(dict.fromkeys(policy.progress for policy in policies or ())) or "none",
        "max_new_tokens": settings.max_new_tokens,
        "canvas_length": model.config.canvas_length,
        "max_denoising_steps": settings.max_denoising_steps,
        "temperature": f"{settings.t_max}..{settings.t_min}",
        "stability_threshold": settings.stability_threshold,
        "confidence_threshold": settings.confidence_threshold,
        "cache": settings.cache_implementation or "dynamic",
        "eos": ",".join(map(str, end_of_text_ids(settings.eos_token_id))) or "none",
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return " ".join(f"{key}={value}" for key, value in parts.items())
