"""Unsupported parameters of requests. Nothing here needs vLLM: parameters are read by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from l2pd_adapters.request_fields import ONE_ANSWER, check_fields
from l2pd_adapters.request_sampling import (
    FIELDS,
    check_log_probabilities,
    check_sampling,
    check_top,
)
from l2pd_adapters.vllm.settings import KEY, DiffusionGemmaServer, VllmServer, takes_no_policy
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown_values import shown

ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "min_tokens": (0,),
    "logit_bias": (None, {}),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None, []),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "structured_outputs": (None,),
}
"""Unsupported parameters, each with its neutral values."""


_HINTS = {
    "custom_params": 'vLLM takes vllm_xargs: {"decoding_plugin": NAME}',
    "unmask_policy": 'vLLM takes vllm_xargs: {"decoding_plugin": NAME}',
    "decoding_plugin": 'its place is in vllm_xargs: {"decoding_plugin": NAME}',
}

Endpoint = Literal["chat", "completions", "responses"]

_HONOURED: dict[Endpoint, frozenset[str]] = {
    "chat": frozenset({"vllm_xargs", "tools", "logprobs", "top_logprobs"}),
    "completions": frozenset({"vllm_xargs", "echo", "logprobs"}),
    "responses": frozenset({"vllm_xargs", "tools"}),
}
"""Fields with an effect at each endpoint."""


def check_typed(
    body: Mapping[str, Any], endpoint: Endpoint, of_the_model: Mapping[str, Any]
) -> None:
    """Raise L2PDError for a field of the request's JSON without effect, by the client's name of it.
    of_the_model: the sampling parameters in the checkpoint's own config.
    """
    check_fields(
        body,
        honoured=_HONOURED[endpoint],
        reasons=_HINTS,
        defaults=of_the_model,
    )
    check_sampling(body)
    check_log_probabilities(body, chat=endpoint == "chat")


def check(
    params: Any, of_the_model: Mapping[str, Any], model_name: str, settings: VllmServer
) -> None:
    """Raise L2PDError, which names the parameter and the choices, for unsupported SamplingParams of
    vLLM. of_the_model: the sampling parameters in the checkpoint's own config.
    """
    check_effects(params, of_the_model)
    unknown = [key for key in params.extra_args or {} if key.startswith("diffusion_")]
    if unknown:
        raise L2PDError(f"{shown(unknown[0])[1:-1]} is for DiffusionGemma, not for {model_name}")
    settings.choose(params)


def check_noise(params: Any, settings: DiffusionGemmaServer) -> None:
    """As `check`, for parameters that vLLM itself does not refuse for DiffusionGemma."""
    if (params.extra_args or {}).get("diffusion_constrained"):
        raise L2PDError(
            "diffusion_constrained: the policy sees the probabilities of all tokens; a server that "
            "is launched without --decoding-plugin grants it"
        )
    settings.choose(params)


def check_names_no_policy(params: Any, model_config: Any) -> None:
    """Raise L2PDError if a request names a policy for a model with vLLM's own sampler, such as
    DiffusionGemma launched without a policy.
    """
    named = [key for key in params.extra_args or {} if key.partition(".")[0] == KEY]
    if named:
        raise L2PDError(f"{shown(named[0])[1:-1]}: {takes_no_policy(model_config)}")


def check_effects(params: Any, of_the_model: Mapping[str, Any]) -> None:
    """Raise L2PDError for sampling parameters that would have no effect or are out of bounds.
    Values that equal the model's own defaults are not user requests."""
    if params.n != 1:
        raise L2PDError(f"n={shown(params.n)}: {ONE_ANSWER}")
    check_sampling({name: getattr(params, name) for name in (*FIELDS, "seed")})
    check_top("logprobs", params.logprobs)
    for name, nothing in ASKS_FOR_NOTHING.items():
        value = getattr(params, name)
        if value not in nothing and value != of_the_model.get(name):
            raise L2PDError(
                f"{name}={shown(value)} is not supported with diffusion language models"
            )
