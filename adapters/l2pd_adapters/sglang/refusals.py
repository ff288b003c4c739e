"""Unsupported parameters of requests. Nothing here needs SGLang: parameters are read by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from l2pd_adapters.request_fields import NO_EFFECT, ONE_ANSWER, check_fields
from l2pd_adapters.request_sampling import (
    FIELDS,
    check_log_probabilities,
    check_sampling,
    check_top,
)
from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown_values import shown

_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "beam_width": (None, 1),
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

_OF_A_CLIENT: dict[str, tuple[Any, ...]] = {"watermark": (None,)}
"""The same, for those that the scheduler has in another form, or from the operator."""

_MAY_BE_SET = frozenset(
    {
        *("text", "input_ids", "sampling_params", "stream", "rid", "session_id"),
        *("logprob_start_len", "return_text_in_logprobs", "return_prompt_token_ids"),
        *("return_logprob", "top_logprobs_num"),
        *("log_metrics", "no_logs", "custom_labels", "external_trace_header", "received_time"),
        *("priority", "extra_key", "cache_salt", "routing_key", "conversation_id", "modalities"),
        *("lora_path", "routed_dp_rank", "data_parallel_rank", "require_reasoning"),
    }
)
"""The fields of a GenerateReqInput that a request may set. Every other one asks for something that
diffusion language models do not have here (log-probabilities, images, embeddings, sessions), or is
SGLang's own; some of them end its scheduler."""

_MAY_BE_EMPTY = frozenset(
    {
        *("token_ids_logprob", "return_sampling_mask"),
        *("custom_logit_processor", "image_data", "video_data", "audio_data", "video_config"),
    }
)
"""Of the others, those that SGLang's endpoints fill with empty values, or lists of them."""

_OF_A_REQUEST = (
    "token_ids_logprob",
    "return_flat_raw_top_logprobs",
    "return_sampling_mask",
    "custom_logit_processor",
)
"""The same as the scheduler has them in a Req; false, zero and empty values are neutral."""

_HINTS = {
    "vllm_xargs": 'SGLang takes custom_params: {"unmask_policy": NAME}',
    "decoding_plugin": 'SGLang takes custom_params: {"unmask_policy": NAME}',
    "unmask_policy": 'its place is in custom_params: {"unmask_policy": NAME}',
    "custom_params": 'its place is in sampling_params: {"custom_params": {...}}',
}

_MISPLACED = (
    *FIELDS,
    *("max_new_tokens", "stop", "stop_token_ids", "ignore_eos", "sampling_seed"),
    *("max_tokens", "max_completion_tokens", "seed", "no_stop_trim", "skip_special_tokens"),
)
"""Sampling parameters, and OpenAI's names of them, that /generate would not see beside its own."""

Endpoint = Literal["chat", "completions", "generate", "messages"]

_HONOURED: dict[Endpoint, frozenset[str]] = {
    "chat": frozenset({"custom_params", "tools", "logprobs", "top_logprobs"}),
    "completions": frozenset({"custom_params", "echo", "logprobs"}),
    "generate": frozenset({"return_logprob", "top_logprobs_num"}),
    "messages": frozenset({"tools"}),
}
"""Fields with an effect at each endpoint."""

_NEUTRAL_AT: dict[Endpoint, dict[str, tuple[Any, ...]]] = {
    "messages": {"temperature": (0, 1), "top_p": (1,), "top_k": (-1, 0, 1)},
}
"""Neutral values that are others at an endpoint."""

_REASONS_AT: dict[Endpoint, dict[str, str]] = {
    "messages": dict.fromkeys(
        ("temperature", "top_p", "top_k"), "/v1/messages decodes greedily; leave it out"
    ),
}

_ALLOWED = {
    "n": ONE_ANSWER,
    "stop_regex": "the scheduler matches patterns, and a slow one stops every request; use stop",
}


def check_effects(
    params: Mapping[str, Any], settings: SglangServer, *, of_client: bool = True
) -> None:
    """Raise L2PDError for a sampling parameter that would have no effect. of_client: the parameters
    are as the client has sent them, not yet normalised by SGLang.
    """
    for name, nothing in (_ASKS_FOR_NOTHING | (_OF_A_CLIENT if of_client else {})).items():
        value = params.get(name)
        if value is None or value in nothing or value == settings.sampling_defaults.get(name):
            continue
        said = _ALLOWED.get(name, NO_EFFECT)
        raise L2PDError(f"{name}={shown(value)}: {said}")


def check_typed(
    body: Mapping[str, Any],
    endpoint: Endpoint,
    settings: SglangServer,
    *,
    honoured: Sequence[str] = (),
) -> None:
    """Raise L2PDError for a field of the request's JSON without effect, by the client's name of it.

    honoured: fields that have an effect because of how the server was launched.
    """
    check_fields(
        body,
        honoured=_HONOURED[endpoint].union(honoured),
        neutral=_NEUTRAL_AT.get(endpoint),
        reasons=_HINTS | _REASONS_AT.get(endpoint, {}),
        defaults=settings.sampling_defaults,
    )
    if endpoint != "generate":
        check_sampling(body)
        check_log_probabilities(body, chat=endpoint == "chat")
    for name in _MISPLACED if endpoint == "generate" else ():
        if body.get(name) is not None:
            raise L2PDError(f"{name}={shown(body[name])}: its place is in sampling_params")
    for name in ("max_tokens", "max_completion_tokens") if endpoint == "chat" else ():
        if type(body.get(name)) is int and body[name] < 1:  # SGLang would take 0 for its default
            raise L2PDError(f"{name}={shown(body[name])}: expected at least 1")


def refusal(request: Any, settings: SglangServer) -> str | None:
    """The fault of a Req in the scheduler's process, which may not have passed admission."""
    params = request.sampling_params
    values = {name: getattr(params, name, None) for name in _ASKS_FOR_NOTHING}
    try:
        if not isinstance(params.ignore_eos, bool):
            raise L2PDError(f"ignore_eos={shown(params.ignore_eos)}: expected true or false")
        check_effects(values, settings, of_client=False)
        check_sampling({name: getattr(params, name, None) for name in (*FIELDS, "sampling_seed")})
        check_rest(request)
        check_ids(request.origin_input_ids, settings.model.vocab_size)
    except L2PDError as error:
        return str(error)
    return None


def check_rest(request: Any) -> None:
    """Raise L2PDError for parameters of a Req without effect that are outside the sampling
    parameters.
    """
    for name in _OF_A_REQUEST:
        _check_neutral(name, getattr(request, name, None))
    wanted = request.return_logprob
    if not isinstance(wanted, bool):
        raise L2PDError(f"return_logprob={shown(wanted)}: expected true or false")
    check_top("top_logprobs_num", request.logprob.top_logprobs_num)
    _check_neutral("token_ids_logprob", request.logprob.token_ids_logprob)


def check_wanted(request: Any, batch: bool = False) -> None:
    """Raise L2PDError for log-probabilities that a GenerateReqInput or a Req cannot ask for.
    batch: whether it has several prompts, and may have a list with a value for each.
    """
    for name in ("return_logprob", "top_logprobs_num", "logprob_start_len"):
        value = getattr(request, name, None)
        if isinstance(value, list) and not batch:
            raise L2PDError(f"{name}={shown(value)}: expected one value for one prompt")
    for value in _each(request.return_logprob):
        if value is not None and not isinstance(value, bool):
            raise L2PDError(f"return_logprob={shown(value)}: expected true or false")
    for value in _each(request.top_logprobs_num):
        check_top("top_logprobs_num", value)
    for value in _each(request.logprob_start_len):
        if value not in (None, -1) and any(_each(request.return_logprob)):
            raise L2PDError(
                f"logprob_start_len={shown(value)}: a prompt has no log-probabilities; leave it out"
            )


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_input(request: Any) -> None:
    """Raise L2PDError for a field of a GenerateReqInput that a request may not set, or whose shape
    SGLang would not expect.
    """
    batch = isinstance(_prompts(request), list) and not _is_ids(request)
    rid = request.rid
    if isinstance(rid, list) and not (batch and rid and all(isinstance(r, str) for r in rid)):
        raise L2PDError(f"rid={shown(rid)}: expected a text, or one for each prompt")
    check_wanted(request, batch)
    if batch and [] in _prompts(request):
        raise L2PDError("input_ids=[[]]: expected at least one token for each prompt")
    params = request.sampling_params
    if isinstance(params, list) and not (batch and len(params) == len(_prompts(request))):
        raise L2PDError(
            f"sampling_params={shown(params)}: expected names and values, or one for each prompt"
        )
    for each in fields(request):
        value = getattr(request, each.name)
        if each.name in _MAY_BE_SET or value is None or value is False:
            continue
        if each.name in _MAY_BE_EMPTY:
            _check_neutral(each.name, value)
        elif value != each.default:  # an empty list, too, can end the scheduler
            raise L2PDError(f"{each.name}={shown(value)}: {NO_EFFECT}")


def _prompts(request: Any) -> Any:
    return request.text or request.input_ids


def _is_ids(request: Any) -> bool:
    """Whether the prompt is one list of token ids."""
    ids = request.input_ids
    return not request.text and isinstance(ids, list) and not (ids and isinstance(ids[0], list))


def _check_neutral(name: str, value: Any) -> None:
    if any(value) if isinstance(value, list) else value:
        raise L2PDError(f"{name}={shown(value)}: {NO_EFFECT}")


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
