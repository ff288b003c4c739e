"""Decoding calls: `generate`, and the same for transformers' `custom_generate`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, overload

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from typing_extensions import Unpack

from l2pd_adapters.huggingface import diffusion_gemma
from l2pd_adapters.huggingface.call_types import GenerateKeywords
from l2pd_adapters.huggingface.checking import GENERATE, MOST_SEQUENCES, Whole, check
from l2pd_adapters.huggingface.history import warn_of_fallback, warn_of_idle_weights
from l2pd_adapters.huggingface.keywords import (
    OUR_KEYWORDS,
    merged_config,
    refuse_unknown,
)
from l2pd_adapters.huggingface.loop import decode
from l2pd_adapters.huggingface.models.model_info import mask_token_of, name_of, require_model
from l2pd_adapters.huggingface.output import DiffusionGenerateOutput
from l2pd_adapters.huggingface.prompts import (
    check_prompts,
    check_room,
    left_padded_mask,
    prompt_ids,
)
from l2pd_adapters.huggingface.settings import PolicyChoice, StepObserver, make_settings
from l2pd_plugins.errors import L2PDError


@overload
def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Any = None,
    return_dict_in_generate: Literal[True],
    **kwargs: Unpack[GenerateKeywords],
) -> DiffusionGenerateOutput: ...


@overload
def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: None = None,
    streamer: Any = None,
    return_dict_in_generate: Literal[False] | None = None,
    **kwargs: Unpack[GenerateKeywords],
) -> Tensor: ...


@overload
def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Any = None,
    return_dict_in_generate: bool | None = None,
    **kwargs: Unpack[GenerateKeywords],
) -> Tensor | DiffusionGenerateOutput: ...


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Any = None,
    **kwargs: Any,
) -> Tensor | DiffusionGenerateOutput:
    """Decode a batch of prompts with a diffusion language model.

    Args:
        model: a diffusion language model (enabled or not).
        inputs, input_ids: (B, P) token ids, padded on the left.
        attention_mask: (B, P), 0 on padding; None if there is no padding.
        generation_config: settings. Precedence: keywords, then `generation_config`, then the
            model's own config. It may also have the settings below as attributes.
        streamer: `TextDiffusionStreamer`, `TextStreamer`, `TextIteratorStreamer`, or any object
            with put, end and optionally put_draft(value=...); for one sequence.
        unmask_policy: name, config mapping, or policy object; or a list with one for each prompt.
            By default "fixed_schedule" at one token per step.
        unmask_options: options for a policy that is given by name.
        block_length: positions per block; by default the model's.
        cache: "none" (default), "prefix" or "dual", see `forward.bidirectional`; for a
            block-causal model "block" (default) or "none", see `forward.block_causal`.
        end_of_text: "block" (default: a committed end-of-text token ends the text), "predicted" or
            "off", see `l2pd_plugins.end_of_text.EndOfText`.
        seed: for sampling, one number or one per sequence; see `transformers.set_seed` otherwise.
            What a sequence draws depends on its seed alone, and is the same in all engines.
        suppress_mask: never predict the mask token (default); False is for parity with code that
            does not suppress it: a position that predicts it stays masked and is decoded again, in
            the first block_length steps of a block.
        on_step: called after every denoising step, see `StepObserver`.
        observe: statistics for on_step, in addition to those that the policies require.
        max_new_tokens: length of the canvas (or max_length). These, do_sample, temperature, top_k,
            top_p, min_p, num_return_sequences, eos_token_id, pad_token_id and
            return_dict_in_generate are as in transformers; bos_token_id is not used.

    Returns:
        (B * num_return_sequences, P + N) token ids, or a DiffusionGenerateOutput with
        return_dict_in_generate=True. N is the longest answer; shorter ones are padded.

    Raises L2PDError, before any forward pass, that names every unsupported argument.
    """
    require_model(model)
    prompts = prompt_ids(inputs, input_ids)
    for keyword, value in (
        ("attention_mask", attention_mask),
        ("generation_config", generation_config),
        ("streamer", streamer),
    ):
        check(GENERATE, keyword, value)
    if diffusion_gemma.decodes(model):
        if diffusion_gemma.cache_of(kwargs) is None:
            if attention_mask is not None:
                attention_mask = left_padded_mask(prompts, attention_mask)
            check_prompts(
                prompts,
                attention_mask,
                vocabulary=model.config.text_config.vocab_size,
                mask_token_id=None,
                pad_token_id=None,
            )
        return diffusion_gemma.generate(
            model,
            prompts,
            attention_mask,
            generation_config,
            streamer,
            kwargs,
            name=name_of(model),
        )
    refuse_unknown(kwargs)
    mask = left_padded_mask(prompts, attention_mask)
    merged = merged_config(model, generation_config, kwargs)
    repeats = check(
        {"num_return_sequences": Whole(1, MOST_SEQUENCES)},
        "num_return_sequences",
        merged.get("num_return_sequences", 1),
    )
    if repeats > 1 and not merged.get("do_sample", False):
        raise L2PDError(
            f"num_return_sequences={repeats} with greedy decoding gives {repeats} equal answers; "
            "set do_sample=True"
        )
    _check_prompts(model, prompts, attention_mask, merged)
    prompts = prompts.repeat_interleave(repeats, dim=0).to(model.device)
    mask = mask.repeat_interleave(repeats, dim=0).to(model.device)
    return _run(model, prompts, mask, merged, streamer)


def custom_generate(
    model: Any,
    input_ids: Tensor,
    *,
    generation_config: GenerationConfig,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    unmask_policy: PolicyChoice | list[PolicyChoice] | None = None,
    unmask_options: dict[str, Any] | None = None,
    block_length: int | None = None,
    cache: str | Cache | None = None,
    end_of_text: str | None = None,
    seed: int | list[int] | None = None,
    suppress_mask: bool | None = None,
    on_step: StepObserver | None = None,
    observe: Collection[str] | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | DiffusionGenerateOutput:
    """The same loop as a `custom_generate` function for a model that is not enabled::

        model.generate(**inputs, custom_generate=custom_generate, unmask_policy="learn2pd")

    transformers prepares and expands the inputs. It passes no streamer to a custom generate; bind
    one with ``functools.partial(custom_generate, streamer=streamer)``. Since 5.24 it uses the
    keyword `cache` for a cache of its own: to choose one of `CACHES`, pass use_cache=False as well,
    or make it an attribute of the generation config.
    """
    harmless = (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        MaxLengthCriteria,
        EosTokenCriteria,
    )
    for item in [*(logits_processor or ()), *(stopping_criteria or ())]:
        if not isinstance(item, harmless):
            raise L2PDError(f"{type(item).__name__} is not supported by diffusion decoding")
    # attention_mask must not be in the signature: transformers would treat it as an argument of
    # only this function and not prepare it.
    attention_mask = check(GENERATE, "attention_mask", model_kwargs.pop("attention_mask", None))
    mask = left_padded_mask(input_ids, attention_mask)
    check(GENERATE, "streamer", streamer)
    # Arguments that transformers has prepared for autoregressive decoding.
    for prepared in ("position_ids", "past_key_values", "use_cache"):
        model_kwargs.pop(prepared, None)
    if isinstance(cache, Cache):  # transformers' own, by its name since 5.24
        cache = None
    refuse_unknown(model_kwargs, unmask_policy)
    given = (
        unmask_policy,
        unmask_options,
        block_length,
        cache,
        end_of_text,
        seed,
        suppress_mask,
        on_step,
        observe,
    )
    merged = merged_config(model, generation_config, dict(zip(OUR_KEYWORDS, given, strict=True)))
    _check_prompts(model, input_ids, mask, merged)
    return _run(model, input_ids, mask, merged, streamer)


def _check_prompts(model: Any, prompts: Tensor, mask: Tensor | None, merged: Any) -> None:
    check_prompts(
        prompts,
        mask,
        vocabulary=model.config.vocab_size,
        mask_token_id=mask_token_of(model),
        pad_token_id=merged.get("pad_token_id"),
    )


def _run(
    model: Any,
    prompts: Tensor,
    mask: Tensor,
    merged: dict[str, Any],
    streamer: Any,
) -> Tensor | DiffusionGenerateOutput:
    _refuse_virtual_tokens(model)
    batch, prompt_length = prompts.shape
    name = name_of(model)
    settings = make_settings(model, prompt_length, batch, merged, name=name, streamer=streamer)
    family, canvas = settings.model.family, settings.canvas
    if family.logit_shift and int(mask.sum(-1).min()) < family.logit_shift:
        raise L2PDError(
            f"{family.name}: a position is predicted {family.logit_shift} before it, so every "
            "prompt holds at least as many tokens"
        )
    keyword = "max_new_tokens" if "max_new_tokens" in merged else "max_length"
    check_room(model, int(mask.sum(-1).max()), canvas.max_new_tokens, keyword)
    decoded = decode(model, prompts, mask, settings)
    trace = decoded.trace
    warn_of_fallback(settings.policies, trace)
    warn_of_idle_weights(settings.policies, trace)
    longest = canvas.max_new_tokens
    if canvas.end_of_text.rule != "off":
        longest = int(trace.length.max())
    answers = decoded.tokens[:, :longest]
    if canvas.end_of_text.rule != "off":
        columns = torch.arange(longest, device=answers.device)
        behind = columns >= trace.length.unsqueeze(-1)
        answers = answers.masked_fill(behind, canvas.pad_token_id)
    sequences = torch.cat([prompts, answers], dim=1)
    if not settings.return_dict:
        return sequences
    return DiffusionGenerateOutput(
        sequences=sequences,
        nfe=trace.nfe,
        tokens_per_forward=trace.tokens_per_forward,
        trace=trace,
        reference_nfe=decoded.reference_nfe,
        configuration=settings.describe(model),
    )


def _refuse_virtual_tokens(model: Any) -> None:
    """Raise L2PDError for PEFT adapters that put tokens before the prompt: they are implemented in
    PEFT's own forward, which decoding never calls. Other adapters are inside the layers.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise L2PDError(
            f"a PEFT adapter of type {config.peft_type.value} puts tokens before the prompt, which "
            "is not supported; adapters inside the layers are, as LoRA's"
        )
