"""What a request may ask for, said before it is queued: a wrong one is answered with HTTP 400."""

from __future__ import annotations

import functools
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
    """vLLM validates a request when its first output is awaited, which for a stream is after HTTP
    200 has been sent. A server of one of our models validates it when `generate` is called."""
    from vllm.v1.engine.input_processor import InputProcessor

    begin = InputProcessor.__init__

    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        # Importing it here would be too early, and of no use to a process that has no server.
        server = sys.modules.get("vllm.v1.engine.async_llm")
        if server is not None and settings_of(self.model_config) is not None:
            _validate_when_called(server.AsyncLLM)
            _refuse_beam_search()

    InputProcessor.__init__ = __init__


def _validate_when_called(engine_class: Any) -> None:
    generate = engine_class.generate
    if hasattr(generate, "_l2pd"):
        return

    @functools.wraps(generate)
    def validated(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if settings_of(self.model_config) is not None:
            processor = self.input_processor
            processor._validate_params(sampling_params, ("generate",))
            if isinstance(prompt, dict) and "type" in prompt:  # else it is not tokenized yet
                processor._validate_model_input(prompt, "decoder")
        return generate(self, prompt, sampling_params, *args, **kwargs)

    validated._l2pd = True  # type: ignore[attr-defined]
    engine_class.generate = validated


def _refuse_beam_search() -> None:
    """Beam search asks for log-probabilities of its own, token by token."""
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    search = BeamSearchOnlineMixin.beam_search
    if hasattr(search, "_l2pd"):
        return

    @functools.wraps(search)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        if settings_of(self.engine_client.model_config) is not None:
            raise VLLMValidationError(
                "use_beam_search=True is not supported with diffusion language models"
            )
        return search(self, *args, **kwargs)

    beam_search._l2pd = True  # type: ignore[attr-defined]
    BeamSearchOnlineMixin.beam_search = beam_search


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
