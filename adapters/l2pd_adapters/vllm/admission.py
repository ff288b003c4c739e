"""What a request may ask for, said before it is queued: a wrong one is answered with HTTP 400."""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from l2pd_adapters.vllm.settings import (
    KEY,
    NoiseSettings,
    ServerSettings,
    settings_of,
    takes_no_policy,
)
from l2pd_plugins.errors import L2PDError

_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "structured_outputs": (None,),
}
"""Parameters that cannot be granted, each with the values that ask for nothing."""


def install() -> None:
    """Have vLLM ask here about requests to diffusion language models
    (`SamplingParams._validate_diffusion`)."""
    stock = SamplingParams._validate_diffusion
    if getattr(stock, "_l2pd", False):
        return

    @functools.wraps(stock)
    def validate(self: SamplingParams, model_config: Any) -> None:
        settings = settings_of(model_config)
        if settings is None:
            if model_config.is_diffusion:
                _check_names_no_policy(self, model_config)
            stock(self, model_config)
        elif isinstance(settings, NoiseSettings):
            stock(self, model_config)
            check_noise(self, settings)
        else:
            check(self, model_config, settings)

    validate._l2pd = True  # type: ignore[attr-defined]
    SamplingParams._validate_diffusion = validate


def check(params: SamplingParams, model_config: Any, settings: ServerSettings) -> None:
    """Raise VLLMValidationError, which names the choices, if the request cannot be served so."""
    _check_sampling(params, model_config.get_diff_sampling_param())
    unknown = [key for key in params.extra_args or {} if key.startswith("diffusion_")]
    if unknown:
        raise VLLMValidationError(
            f"{unknown[0]} is for DiffusionGemma, not for {model_config.model}"
        )
    _check_policy(params, settings)


def check_noise(params: SamplingParams, settings: NoiseSettings) -> None:
    """As `check`, of what vLLM itself does not refuse for DiffusionGemma."""
    if (params.extra_args or {}).get("diffusion_constrained"):
        raise VLLMValidationError(
            "diffusion_constrained: the policy sees the probabilities of all tokens; a server that "
            "is launched without --decoding-plugin grants it"
        )
    _check_policy(params, settings)


def _check_policy(params: SamplingParams, settings: ServerSettings) -> None:
    try:
        settings.choose(params)
    except L2PDError as error:
        raise VLLMValidationError(str(error)) from error


def _check_names_no_policy(params: SamplingParams, model_config: Any) -> None:
    """A model with a sampler of its own takes no policy; DiffusionGemma if none was named at
    launch."""
    named = [key for key in params.extra_args or {} if key.partition(".")[0] == KEY]
    if named:
        raise VLLMValidationError(f"{named[0]}: {takes_no_policy(model_config)}")


def _check_sampling(params: SamplingParams, of_the_model: dict) -> None:
    """Greedy decoding is all there is; the model's own defaults are nobody's wish."""
    if params.temperature not in (0, 1, of_the_model.get("temperature")):
        raise VLLMValidationError(
            f"temperature={params.temperature}: decoding is greedy; temperature is 0, or left out"
        )
    for name, nothing in _ASKS_FOR_NOTHING.items():
        value = getattr(params, name)
        if value not in nothing and value != of_the_model.get(name):
            raise VLLMValidationError(
                f"{name}={value!r} is not supported with diffusion language models"
            )
