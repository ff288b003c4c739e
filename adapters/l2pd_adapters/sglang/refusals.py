"""Unsupported parameters of requests. Nothing here needs SGLang: parameters are read by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown_values import shown

_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "beam_width": (None, 1),
    "temperature": (0, 1),
    "min_p": (0,),
    "min_new_tokens": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": (None, {}),
    "json_schema": (None, ""),
    "regex": (None, ""),
    "ebnf": (None, ""),
    "structural_tag": (None, ""),
    "stop_regex": (None, "", []),
}
"""Sampling parameters that are refused, each with its neutral values."""

_OF_A_REQUEST = (
    "return_logprob",
    "top_logprobs_num",
    "token_ids_logprob",
    "return_flat_raw_top_logprobs",
    "return_sampling_mask",
    "custom_logit_processor",
)
"""Refused parameters outside the sampling parameters; false, zero and empty values are neutral."""

_ALLOWED = {
    "n": "decoding is greedy, so all answers are the same one; expected 1",
    "temperature": "decoding is greedy; expected 0, 1, or nothing",
    "stop_regex": "the scheduler matches patterns, and a slow one stops every request; use stop",
}


def check_effects(params: Mapping[str, Any], settings: SglangServer) -> None:
    """Raise L2PDError for a sampling parameter that would have no effect."""
    for name, nothing in _ASKS_FOR_NOTHING.items():
        value = params.get(name)
        if value is None or value in nothing or value == settings.sampling_defaults.get(name):
            continue
        said = _ALLOWED.get(name, "has no effect on diffusion language models; leave it out")
        raise L2PDError(f"{name}={shown(value)}: {said}")


def refusal(request: Any, settings: SglangServer) -> str | None:
    """The fault of a Req in the scheduler's process, which may not have passed admission."""
    params = request.sampling_params
    values = {name: getattr(params, name, None) for name in _ASKS_FOR_NOTHING}
    if getattr(params, "top_k", None) == 1:  # SGLang replaces temperature 0 by this
        values.pop("temperature")
    try:
        if not isinstance(params.ignore_eos, bool):
            raise L2PDError(f"ignore_eos={shown(params.ignore_eos)}: expected true or false")
        check_effects(values, settings)
        check_rest(request)
        check_ids(request.origin_input_ids, settings.model.vocab_size)
    except L2PDError as error:
        return str(error)
    return None


def check_rest(request: Any) -> None:
    """Raise L2PDError for parameters without effect that are outside the sampling parameters."""
    for name in _OF_A_REQUEST:
        value = getattr(request, name, None)
        if any(value) if isinstance(value, list) else value:
            raise L2PDError(
                f"{name}={shown(value)}: has no effect on diffusion language models; leave it out"
            )


def check_ids(ids: Sequence[Any], vocabulary: int) -> None:
    """Raise L2PDError for invalid token ids, in a list or in a list of lists."""
    for each in ids if len(ids) and isinstance(ids[0], list) else [ids]:
        if not isinstance(each, Sequence) or not all(type(token) is int for token in each):
            raise L2PDError(f"input_ids={shown(each)}: expected whole numbers")
        if len(each) and not 0 <= min(each) <= max(each) < vocabulary:
            wrong = next(token for token in each if not 0 <= token < vocabulary)
            raise L2PDError(
                f"input_ids: {shown(wrong)} is no token; expected 0 to {vocabulary - 1}"
            )
