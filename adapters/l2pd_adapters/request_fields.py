"""The fields of a request's JSON that have no effect on a diffusion language model, by the names
that clients use.

OpenAI's API, vLLM and SGLang spell the same wish differently, and a server drops a field that it
does not know without a word. Here each is refused under the name that the client typed. A value
that asks for nothing (``n`` 1, a penalty of 0, null) is granted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown_values import shown

NO_EFFECT = "has no effect on diffusion language models; leave it out"
ONE_ANSWER = "a request has one answer; send it again, with another seed; expected 1"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "beam_width": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "custom_logit_processor": ("",),
    "logits_processors": ([],),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "prompt_logprobs": (False,),
    "logprob_token_ids": ([],),
    "return_logprob": (False,),
    "top_logprobs_num": (0,),
    "token_ids_logprob": ([],),
    "response_format": ({}, {"type": "text"}),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": ("",),
    "guided_choice": ([],),
    "guided_grammar": ("",),
    "json_schema": ("",),
    "regex": ("",),
    "ebnf": ("",),
    "structural_tag": ("",),
    "stop_regex": ("", []),
    "tools": ([],),
    "tool_choice": ("none", "auto", {"type": "none"}, {"type": "auto"}),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "suffix": ("",),
    "echo": (False,),
    "watermark": ({}, {"enabled": False}),
    "watermarking": (False,),
    "length_penalty": (1,),
    "thinking_token_budget": (),
    "max_thinking_tokens": (),
    "session_params": ({},),
    "return_hidden_states": (False,),
    "return_sampling_mask": (False,),
    "vllm_xargs": ({},),
    "custom_params": ({},),
    "unmask_policy": (),
    "decoding_plugin": (),
}
"""The fields, each with its neutral values; None is neutral for all."""

_REASONS = {
    "n": ONE_ANSWER,
    "best_of": ONE_ANSWER,
    "stop_regex": "matching a pattern could stop every request; use stop",
    "tool_choice": 'no grammar forces a tool call; expected "auto" or "none"',
    "suffix": "text before a suffix is not filled in; leave it out",
    "session_params": "sessions are not supported with diffusion language models; leave it out",
}


def check_fields(
    body: Mapping[str, Any],
    *,
    honoured: Collection[str] = (),
    neutral: Mapping[str, tuple[Any, ...]] | None = None,
    reasons: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Raise L2PDError, which names the field as the client typed it, for a value without effect.

    body: the JSON of the request. honoured: fields that the server's endpoint does act on. neutral:
    neutral values that are others here. reasons: for a field, what to write instead. defaults: the
    checkpoint's own sampling parameters; values that equal them are not user requests.
    """
    for name, value in body.items():
        nothing = (neutral or {}).get(name, NEUTRAL.get(name))
        if nothing is None or name in honoured or value is None:
            continue
        if any(_same(value, each) for each in nothing):
            continue
        default = (defaults or {}).get(name)
        if default is not None and _same(value, default):
            continue
        said = (reasons or {}).get(name) or _REASONS.get(name, NO_EFFECT)
        raise L2PDError(f"{name}={shown(value)}: {said}")
    for name in ("text", "output_config"):  # of the responses API, and of Anthropic's
        inner = body.get(name)
        form = inner.get("format") if isinstance(inner, Mapping) else None
        if form is not None and form not in NEUTRAL["response_format"]:
            raise L2PDError(f"{name}: format={shown(form)}: {NO_EFFECT}")
    include = body.get("include")
    if isinstance(include, list) and any("logprobs" in str(each) for each in include):
        raise L2PDError(f"include={shown(include)}: log-probabilities are not available")
    if _has_strict_tool(body.get("tools")):
        raise L2PDError("tools: no grammar makes a function's strict true; leave strict out")


async def typed_body(request: Any) -> Mapping[str, Any]:
    """The JSON that the client has sent, from Starlette's Request, which has read it already; empty
    for a request that did not come by HTTP.
    """
    body = await request.json() if hasattr(request, "_json") else None
    return body if isinstance(body, Mapping) else {}


def _same(value: Any, neutral: Any) -> bool:
    """Whether the values are equal in JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _has_strict_tool(tools: Any) -> bool:
    functions = [each.get("function") for each in _mappings(tools)]
    return any(each.get("strict") is True for each in _mappings(functions))


def _mappings(values: Any) -> list[Mapping[str, Any]]:
    """The mappings in a list; none if it is no list."""
    return [v for v in values if isinstance(v, Mapping)] if isinstance(values, list) else []
