"""What a request may say about sampling and log-probabilities, and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest

from l2pd_adapters.request_sampling import (
    FIELDS,
    check_log_probabilities,
    check_sampling,
    sampling_of,
    seed_of,
    wants_sampling,
)
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.sampling import Sampling
from tests.adapters.nasty_values import NASTY

SILENT = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("temperature", -1),
        ("temperature", 1e-30),
        ("temperature", 0.0099),
        ("temperature", 101),
        ("temperature", "0.7"),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("top_k", 2**63),
        ("top_k", 2**31),
        ("top_k", 5.0),
        ("top_k", True),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("min_p", [0.1]),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 1.0),
        ("sampling_seed", "x"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(L2PDError, match=f"^{name}=.*: expected") as refused:
        check_sampling({name: value})
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", [*FIELDS, "seed"])
@pytest.mark.parametrize("value", NASTY)
def test_no_value_raises_anything_else(name: str, value: Any) -> None:
    try:
        check_sampling({name: value})
    except L2PDError:
        return
    assert value is None or isinstance(value, int | float)
    assert wants_sampling({name: value}) in (True, False)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0, "top_p": 0.9},
        {"temperature": 0.01, "top_k": -1, "seed": -(2**63)},
        {"temperature": 100, "top_k": 2**31 - 1, "top_p": 1, "min_p": 1, "seed": 2**63 - 1},
        {"temperature": None, "max_tokens": -1},
    ],
)
def test_values_within_bounds_are_granted(given: dict[str, Any]) -> None:
    check_sampling(given)


@pytest.mark.parametrize(
    ("given", "samples"),
    [
        ({}, False),
        ({"temperature": None, "seed": 3}, False),
        ({"temperature": 0, "top_p": 0.5}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 1}, True),
        ({"top_p": 1, "top_k": -1, "min_p": 0}, False),
        ({"top_p": 0.9}, True),
        ({"top_k": 20}, True),
        ({"top_k": 1}, False),
        ({"min_p": 0.1}, True),
    ],
)
def test_a_request_samples_only_if_it_says_so(given: dict[str, Any], samples: bool) -> None:
    assert wants_sampling(given) is samples


@pytest.mark.parametrize(
    ("changes", "more", "wanted"),
    [
        ({}, {}, None),
        ({"temperature": 0.0}, {"asked": True}, None),
        ({"top_k": 1}, {"asked": True}, None),
        ({}, {"asked": True}, Sampling(seed_of("id"))),
        ({}, {"seed": 4}, Sampling(4)),
        ({"temperature": 0.6}, {"defaults": {"temperature": 0.6}}, None),
        ({"temperature": 0.7}, {"defaults": {"temperature": 0.6}}, Sampling(seed_of("id"), 0.7)),
        ({"top_p": 0.95, "top_k": 20}, {"defaults": {"top_p": 0.95, "top_k": 20}}, None),
        ({"top_k": 20}, {}, Sampling(seed_of("id"), top_k=20)),
        ({"top_k": 320}, {}, None),
        ({"top_k": 10**6, "min_p": 0.5}, {}, Sampling(seed_of("id"), min_p=0.5)),
    ],
)
def test_what_a_worker_makes_of_it(
    changes: dict[str, Any], more: dict[str, Any], wanted: Sampling | None
) -> None:
    rest = {"seed": None, "asked": False, "defaults": {}, "request_id": "id", "vocabulary": 320}
    assert sampling_of({**SILENT, **changes}, **{**rest, **more}) == wanted


def test_seeds_follow_from_ids() -> None:
    seeds = {seed_of(f"request {at}") for at in range(100)}
    assert len(seeds) == 100 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert seed_of("a") == seed_of("a")


@pytest.mark.parametrize(
    ("body", "chat", "name"),
    [
        ({}, True, ""),
        ({"logprobs": True}, True, ""),
        ({"logprobs": True, "top_logprobs": 20}, True, ""),
        ({"logprobs": False, "top_logprobs": 0}, True, ""),
        ({"logprobs": 5}, True, "logprobs"),
        ({"logprobs": 1}, True, "logprobs"),
        ({"top_logprobs": 5}, True, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10**9}, True, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, True, "top_logprobs"),
        ({"logprobs": 20}, False, ""),
        ({"logprobs": 0}, False, ""),
        ({"logprobs": 21}, False, "logprobs"),
        ({"logprobs": -1}, False, "logprobs"),
        ({"logprobs": True}, False, "logprobs"),
        ({"logprobs": 0, "echo": True}, False, "echo"),
        ({"echo": True}, False, ""),
    ],
)
def test_log_probabilities_that_can_be_asked_for(
    body: dict[str, Any], chat: bool, name: str
) -> None:
    if not name:
        check_log_probabilities(body, chat=chat)
        return
    with pytest.raises(L2PDError, match=f"^{name}="):
        check_log_probabilities(body, chat=chat)
