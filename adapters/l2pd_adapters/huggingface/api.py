"""`model.generate(..., unmask_policy=...)`: bound to one model, and undone again.

Nothing is patched on import, and no class is touched: `enable` sets `generate` on the instance, as
transformers itself does for models that ship a custom generate.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from typing_extensions import Unpack

from l2pd_adapters.families import (
    FAMILIES,
    ModelFamily,
    end_of_text_ids,
    end_of_text_of,
    mask_token_of,
)
from l2pd_adapters.huggingface import diffusion_gemma
from l2pd_adapters.huggingface.checking import GENERATE, MOST_SEQUENCES, Whole, check, short
from l2pd_adapters.huggingface.keywords import DiffusionModel, GenerateKeywords
from l2pd_adapters.huggingface.loop import decode
from l2pd_adapters.huggingface.models.attention_check import check_attention
from l2pd_adapters.huggingface.models.model_info import FAMILY, family_of, is_masked_lm, within
from l2pd_adapters.huggingface.models.model_info import mask_token_of as mask_token_in
from l2pd_adapters.huggingface.output import DiffusionGenerateOutput
from l2pd_adapters.huggingface.settings import (
    OUR_KEYWORDS,
    DecodeSettings,
    PolicyChoice,
    StepObserver,
    check_prompts,
    check_room,
    local_folder,
    make_settings,
    merged_config,
    refuse_unknown,
)
from l2pd_plugins.errors import L2PDError


class BoundGenerate:
    """`generate` of one enabled model.

    An object and no bound method: a pickled bound method looks its name up on the class again, and
    a copy of the model would silently decode autoregressively.
    """

    def __init__(
        self, model: Any, name: str, own: GenerationConfig | None, completed: GenerationConfig
    ) -> None:
        self.model = model
        self.name = name
        self.own, self.completed = own, completed
        """The model's generation_config before it was enabled, and what became of it."""

    @overload
    def __call__(
        self,
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
    def __call__(
        self,
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
    def __call__(
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        return_dict_in_generate: bool | None = None,
        **kwargs: Unpack[GenerateKeywords],
    ) -> Tensor | DiffusionGenerateOutput: ...
    def __call__(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        return generate(self.model, inputs, **kwargs)


def enable(
    model: Any, *, name: str | None = None, family: ModelFamily | None = None
) -> DiffusionModel:
    """Bind diffusion decoding to `model.generate`; returns the model.

    `model.generation_config` gets the end-of-text tokens of the family, besides its own.

    Args:
        model: a transformers model of one of the families in `l2pd_adapters.families`, or a decoder
            whose config says ``is_causal=False`` and names ``mask_token_id`` (and, if it has one,
            ``block_length``); with a `family`, any decoder or masked LM; or DiffusionGemma, see
            `diffusion_gemma`.
        name: what the configuration line calls the model; its folder's or hub name by default.
        family: how the model is to be read, where its config does not say; it stays with the model
            and its copies. None keeps what the model was enabled with, else asks its config.

    Raises L2PDError if the model is no diffusion language model, or does not see what its family
    says.
    """
    _refuse_others(model, name, family)
    if diffusion_gemma.decodes(model):
        diffusion_gemma.refuse_family(family)
        own = model.generation_config
        model.generate = BoundGenerate(model, name or _name_of(model), own, own)
        return cast(DiffusionModel, model)
    family = family or family_of(model)
    _check_readable(model, family)
    own = getattr(model, "generation_config", None)  # a masked LM has none
    completed = _with_end_of_text(model, family, own)
    bound = model.__dict__.get("generate")
    if isinstance(bound, BoundGenerate) and own is bound.completed:
        own = bound.own
    model.generation_config = completed
    setattr(model, FAMILY, family)
    model.generate = BoundGenerate(model, name or _name_of(model), own, completed)
    return cast(DiffusionModel, model)


def _refuse_others(model: Any, name: Any, family: Any) -> None:
    """Raise L2PDError for arguments of `enable` that are something else."""
    if not isinstance(within(model), PreTrainedModel):
        raise L2PDError(
            f"model={short(model)}: expected a model of transformers; load makes one from a name"
        )
    for keyword, value, kind in (("name", name, str), ("family", family, ModelFamily)):
        if not isinstance(value, kind | None):
            raise L2PDError(f"{keyword}={short(value)}: expected a {kind.__name__}")


def disable(model: Any) -> Any:
    """Give the model its own `generate` and `generation_config` back; returns the model.

    Raises L2PDError if it was not enabled.
    """
    bound = getattr(model, "__dict__", {}).get("generate")
    if not isinstance(bound, BoundGenerate):
        raise L2PDError(f"{type(model).__name__} was not enabled")
    if bound.own is None:
        del model.generation_config
    elif model.generation_config is bound.completed:
        model.generation_config = bound.own
    model.__dict__.pop(FAMILY, None)
    del model.generate
    return model


def _check_readable(model: Any, family: ModelFamily) -> None:
    mask_token_id = mask_token_of(model.config, family)
    if family not in FAMILIES:
        check_attention(model, family, mask_token_id)
    elif (
        family.attention == "bidirectional"
        and not is_masked_lm(model)
        and getattr(model.config, "is_causal", True) is not False
    ):
        raise L2PDError(
            f"{family.name}: this {type(model).__name__} is autoregressive; a bidirectional one "
            "has is_causal=False in its config before it is made"
        )


def _with_end_of_text(
    model: Any, family: ModelFamily, own: GenerationConfig | None
) -> GenerationConfig:
    """The model's settings (None if transformers has none for it), completed by the family's
    end-of-text tokens."""
    config = GenerationConfig.from_model_config(model.config) if own is None else own
    named = end_of_text_ids(config.eos_token_id)
    missing = [i for i in end_of_text_of(model.config, family) if i not in named]
    if missing:
        config = copy.copy(config)
        config.eos_token_id = [*named, *missing]
    return config


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
        attention_mask: (B, P), 0 on padding; without it every position counts.
        generation_config: settings; keywords win over it, and it over the model's own. It may
            carry the settings below as attributes, too.
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
        suppress_mask: never predict the mask token (default); False is for parity with code that
            does not suppress it: a position that predicts it stays masked and is decoded again, in
            the first block_length steps of a block.
        on_step: called after every denoising step, see `StepObserver`.
        observe: statistics that on_step is shown beyond what the policies require.
        max_new_tokens: or max_length; these and do_sample, temperature, top_k, top_p,
            num_return_sequences, eos_token_id, pad_token_id, return_dict_in_generate are as in
            transformers; bos_token_id is not used.

    Returns:
        (B * num_return_sequences, P + N) token ids, or a DiffusionGenerateOutput with
        return_dict_in_generate=True. N is the longest answer; shorter ones are padded.

    Raises L2PDError, before any forward pass, for whatever it does not support, by name.
    """
    prompts = _prompts(inputs, input_ids)
    for keyword, value in (
        ("attention_mask", attention_mask),
        ("generation_config", generation_config),
        ("streamer", streamer),
    ):
        check(GENERATE, keyword, value)
    if diffusion_gemma.decodes(model):
        if kwargs.get("past_key_values") is None:
            if attention_mask is not None:
                attention_mask = _left_padded(prompts, attention_mask)
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
            name=_name_of(model),
        )
    refuse_unknown(kwargs)
    mask = _left_padded(prompts, attention_mask)
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
    cache: str | None = None,
    end_of_text: str | None = None,
    seed: int | list[int] | None = None,
    suppress_mask: bool | None = None,
    on_step: StepObserver | None = None,
    observe: Collection[str] | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | DiffusionGenerateOutput:
    """The same loop for transformers' own seam, on a model that is not enabled::

        model.generate(**inputs, custom_generate=custom_generate, unmask_policy="learn2pd")

    transformers prepares and expands the inputs. It hands no streamer to a custom generate; bind
    one with ``functools.partial(custom_generate, streamer=streamer)``.
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
    # attention_mask cannot stand in the signature: transformers would take it for an argument of
    # this function alone and not prepare it.
    attention_mask = check(GENERATE, "attention_mask", model_kwargs.pop("attention_mask", None))
    mask = _left_padded(input_ids, attention_mask)
    check(GENERATE, "streamer", streamer)
    # What transformers has prepared for autoregressive decoding.
    for prepared in ("position_ids", "past_key_values", "use_cache"):
        model_kwargs.pop(prepared, None)
    refuse_unknown(model_kwargs)
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
        mask_token_id=mask_token_in(model),
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
    name = _name_of(model)
    settings = make_settings(model, prompt_length, batch, merged, name=name, streamer=streamer)
    if settings.family.logit_shift and int(mask.sum(-1).min()) < settings.family.logit_shift:
        raise L2PDError(
            f"{settings.family.name}: a position is predicted {settings.family.logit_shift} before "
            "it, so every prompt holds at least as many tokens"
        )
    keyword = "max_new_tokens" if "max_new_tokens" in merged else "max_length"
    check_room(model, int(mask.sum(-1).max()), settings.max_new_tokens, keyword)
    decoded = decode(model, prompts, mask, settings)
    trace = decoded.trace
    longest = settings.max_new_tokens
    if settings.end_of_text.rule != "off":
        longest = int(trace.length.max())
    answers = decoded.tokens[:, :longest]
    if settings.end_of_text.rule != "off":
        columns = torch.arange(longest, device=answers.device)
        behind = columns >= trace.length.unsqueeze(-1)
        answers = answers.masked_fill(behind, settings.pad_token_id)
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
    """A PEFT model's adapters lie inside the layers, but for the kinds that put tokens before the
    prompt: those are in PEFT's own forward, which decoding never calls."""
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise L2PDError(
            f"a PEFT adapter of type {config.peft_type.value} puts tokens before the prompt, which "
            "is not supported; adapters inside the layers are, as LoRA's"
        )


def _prompts(inputs: Tensor | None, input_ids: Tensor | None) -> Tensor:
    if (inputs is None) == (input_ids is None):
        raise L2PDError("give the prompts once: as the first argument or as input_ids")
    prompts = input_ids if inputs is None else inputs
    if not isinstance(prompts, Tensor) or prompts.ndim != 2 or prompts.dtype not in _WHOLE:
        raise L2PDError(
            f"prompts are a tensor of token ids (batch, length), got {_describe(prompts)}"
        )
    if len(prompts) == 0:
        raise L2PDError("the batch holds no prompt")
    return prompts.to(torch.int64)


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
"""What token ids may be stored as."""


def _left_padded(prompts: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones_like(prompts)
    if mask.shape != prompts.shape:
        raise L2PDError(
            f"attention_mask has shape {tuple(mask.shape)}, the prompts {tuple(prompts.shape)}"
        )
    mask = mask.to(prompts.device)
    if not bool(((mask == 0) | (mask == 1)).all()):
        odd = mask[(mask != 0) & (mask != 1)][0].item()
        raise L2PDError(f"attention_mask holds {odd}: expected 1 on tokens and 0 on padding")
    mask = mask.to(torch.int64)
    if bool((mask.diff(dim=-1) < 0).any()):
        raise L2PDError(
            "attention_mask has zeros behind ones: prompts are padded on the left "
            "(tokenizer.padding_side = 'left'), since the canvas follows them"
        )
    return mask


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _name_of(model: Any) -> str:
    bound = model.__dict__.get("generate")
    if isinstance(bound, BoundGenerate):
        return bound.name
    folder = local_folder(model.config)
    if folder is not None:
        return Path(folder).name
    return getattr(model.config, "_name_or_path", "") or type(model).__name__


def configuration_of(model: Any, **settings: Any) -> str:
    """The line that describes a call of generate, of which nothing is decoded.

    Raises L2PDError as `settings_of` does.
    """
    return settings_of(model, **settings).describe(model)


def settings_of(model: Any, **settings: Any) -> DecodeSettings:
    """What a call of generate with one prompt would go by; nothing is decoded.

    Raises L2PDError for settings that generate would refuse: a filter that does not fit the block
    length is found before the first of several policies has run for an hour.
    """
    bound = getattr(model, "generate", None)
    if not isinstance(bound, BoundGenerate):
        raise L2PDError(
            f"{type(model).__name__} is not enabled for diffusion decoding; load it with "
            "l2pd_adapters.huggingface.load, or call enable(model)"
        )
    return make_settings(model, 0, 1, merged_config(model, None, settings), name=bound.name)
