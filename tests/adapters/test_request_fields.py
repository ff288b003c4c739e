"""Fields without effect on diffusion language models, by the names that clients type."""

from __future__ import annotations

from typing import Any

import pytest

from l2pd_adapters.request_fields import NEUTRAL, check_fields
from l2pd_plugins.errors import L2PDError

SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
STRICT = {"type": "function", "function": {**TOOL["function"], "strict": True}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("n", True),
        ("best_of", 2),
        ("min_tokens", 3),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -0.5),
        ("repetition_penalty", 1.5),
        ("logit_bias", {"5": 1.0}),
        ("logprobs", True),
        ("logprobs", 2),
        ("top_logprobs", 2),
        ("prompt_logprobs", 0),
        ("response_format", {"type": "json_object"}),
        ("response_format", SCHEMA),
        ("response_format", "json"),
        ("structured_outputs", {"regex": "a"}),
        ("guided_json", {}),
        ("tools", [TOOL]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("functions", [{"name": "f"}]),
        ("suffix", "x"),
        ("echo", True),
        ("stop_regex", "a*"),
        ("unmask_policy", "klass"),
    ],
)
def test_a_field_without_effect_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(L2PDError, match=f"^{name}="):
        check_fields({"model": "m", name: value})
    check_fields({"model": "m", name: value}, honoured=[name])


@pytest.mark.parametrize("name", NEUTRAL)
def test_values_that_ask_for_nothing_are_granted(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        check_fields({name: value})


def test_ordinary_fields_are_granted() -> None:
    body = {
        "model": "m",
        "messages": [],
        "max_tokens": 5,
        "stop": ["x"],
        "seed": 7,
        "stream": True,
        "user": "u",
        "no_such_field": 1,
        "temperature": 0.0,
        "top_p": 1.0,
    }
    check_fields(body)


def test_the_checkpoints_own_values_are_no_requests() -> None:
    own = {"repetition_penalty": 1.1}
    check_fields(own, defaults=own)
    with pytest.raises(L2PDError, match=r"^repetition_penalty=1\.2"):
        check_fields({"repetition_penalty": 1.2}, defaults=own)


def test_an_endpoint_may_have_other_neutral_values() -> None:
    check_fields({"logprobs": 0})
    with pytest.raises(L2PDError, match=r"^logprobs=0"):
        check_fields({"logprobs": 0}, neutral={"logprobs": ()})


def test_a_reason_says_what_to_write_instead() -> None:
    with pytest.raises(L2PDError, match=r"^vllm_xargs=\{'a': 1\}: write this$"):
        check_fields({"vllm_xargs": {"a": 1}}, reasons={"vllm_xargs": "write this"})


def test_strict_tools_are_refused_where_tools_are_not() -> None:
    check_fields({"tools": [TOOL]}, honoured=["tools"])
    with pytest.raises(L2PDError, match=r"^tools: .*strict"):
        check_fields({"tools": [TOOL, STRICT]}, honoured=["tools"])


@pytest.mark.parametrize("tools", ["x", 5, {"a": 1}, [5], [[STRICT]], [{"function": 5}], [{}]])
def test_malformed_tools_are_left_to_the_engine(tools: Any) -> None:
    check_fields({"tools": tools}, honoured=["tools"])


def test_a_long_value_is_not_repeated_whole() -> None:
    with pytest.raises(L2PDError) as refused:
        check_fields({"suffix": "x" * 100_000})
    assert len(str(refused.value)) < 500
