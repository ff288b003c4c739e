"""What a request may ask for, said before it is queued: a wrong one is answered with HTTP 400."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from l2pd_adapters.admission import ANY_FAILURE
from l2pd_adapters.vllm.settings import (
    KEY,
    DiffusionGemmaServer,
    VllmServer,
    settings_of,
    takes_no_policy,
)
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown import shown

logger = logging.getLogger(__name__)

_HTTP = "vllm.entrypoints.openai"
_REQUESTS = (
    (f"{_HTTP}.chat_completion.protocol", "ChatCompletionRequest"),
    (f"{_HTTP}.completion.protocol", "CompletionRequest"),
    (f"{_HTTP}.responses.protocol", "ResponsesRequest"),
)
"""The requests of an HTTP server that sampling parameters are made of."""

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
        elif isinstance(settings, DiffusionGemmaServer):
            stock(self, model_config)
            check_noise(self, settings)
        else:
            check(self, model_config, settings)

    validate._l2pd = True  # type: ignore[attr-defined]
    SamplingParams._validate_diffusion = validate
    _install_in_servers()


def _install_in_servers() -> None:
    """vLLM asks about a request when its answer is begun, which of a stream is after HTTP 200. So a
    server of one of our models asks as soon as the parameters are made."""
    from vllm.v1.engine.input_processor import InputProcessor

    begin = InputProcessor.__init__

    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        model_config = self.model_config
        if settings_of(model_config) is not None and f"{_HTTP}.api_server" in sys.modules:
            for module, name in _REQUESTS:
                _ask_early(getattr(importlib.import_module(module), name), model_config)

    InputProcessor.__init__ = __init__


def _ask_early(request_class: Any, model_config: Any) -> None:
    make = request_class.to_sampling_params
    if hasattr(make, "_l2pd"):
        return

    @functools.wraps(make)
    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = make(self, *args, **kwargs)
        params._validate_diffusion(model_config)
        return params

    to_sampling_params._l2pd = True  # type: ignore[attr-defined]
    request_class.to_sampling_params = to_sampling_params


def check(params: SamplingParams, model_config: Any, settings: VllmServer) -> None:
    """Raise VLLMValidationError, which names the choices, if the request cannot be served so."""
    _check_sampling(params, model_config.get_diff_sampling_param())
    unknown = [key for key in params.extra_args or {} if key.startswith("diffusion_")]
    if unknown:
        raise VLLMValidationError(
            f"{shown(unknown[0])[1:-1]} is for DiffusionGemma, not for {model_config.model}"
        )
    _check_policy(params, settings)


def check_noise(params: SamplingParams, settings: DiffusionGemmaServer) -> None:
    """As `check`, of what vLLM itself does not refuse for DiffusionGemma."""
    if (params.extra_args or {}).get("diffusion_constrained"):
        raise VLLMValidationError(
            "diffusion_constrained: the policy sees the probabilities of all tokens; a server that "
            "is launched without --decoding-plugin grants it"
        )
    _check_policy(params, settings)


def _check_policy(params: SamplingParams, settings: VllmServer) -> None:
    try:
        settings.choose(params)
    except L2PDError as error:
        raise VLLMValidationError(str(error)) from error
    except ANY_FAILURE as error:  # a request is refused rather than the server ended
        logger.exception("a request cannot be admitted")
        said = f"{type(error).__name__}: {shown(str(error))}"
        raise VLLMValidationError(f"the request cannot be admitted: {said}") from error


def _check_names_no_policy(params: SamplingParams, model_config: Any) -> None:
    """A model with a sampler of its own takes no policy; DiffusionGemma if none was named at
    launch."""
    named = [key for key in params.extra_args or {} if key.partition(".")[0] == KEY]
    if named:
        raise VLLMValidationError(f"{shown(named[0])[1:-1]}: {takes_no_policy(model_config)}")


def _check_sampling(params: SamplingParams, of_the_model: dict) -> None:
    """Decoding is greedy; values that equal the model's own defaults are not user requests."""
    if params.n != 1:
        raise VLLMValidationError(
            f"n={shown(params.n)}: decoding is greedy, so all answers are the same one; expected 1"
        )
    if params.temperature not in (0, 1, of_the_model.get("temperature")):
        raise VLLMValidationError(
            f"temperature={shown(params.temperature)}: decoding is greedy; "
            "temperature is 0, or left out"
        )
    for name, nothing in _ASKS_FOR_NOTHING.items():
        value = getattr(params, name)
        if value not in nothing and value != of_the_model.get(name):
            raise VLLMValidationError(
                f"{name}={shown(value)} is not supported with diffusion language models"
            )
