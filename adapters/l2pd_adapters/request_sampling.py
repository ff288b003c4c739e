"""How a request of a server samples, and which log-probabilities it asks for; the same in all
serving engines.

The engines fill in temperature 1, or the checkpoint's own, for a request that says nothing about
sampling. Such a request decodes greedily here. One that says a temperature above 0 samples, and so
does one that says top_p, top_k or min_p without a temperature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.sampling import Sampling
from l2pd_plugins.shown_values import shown

COOLEST, HOTTEST = 0.01, 100.0
"""The bounds of a temperature other than 0. vLLM raises lower ones to the first without a word."""
MOST_TOP = 20
"""How many of the most probable tokens a request may ask for at each position, as in OpenAI's
API."""
ASKED = "__l2pd_samples"
"""A parameter that an endpoint adds to a request that samples: what the client typed can no longer
be distinguished from what the engine fills in.
"""

_NEUTRAL: dict[str, tuple[Any, ...]] = {"top_p": (1,), "top_k": (-1, 0, 1), "min_p": (0,)}
FIELDS = ("temperature", *_NEUTRAL)
"""The parameters of sampling, besides the seed."""


def check_sampling(given: Mapping[str, Any]) -> None:
    """Raise L2PDError, which names the field, for a parameter of sampling that is out of bounds.
    given: what the client has typed; other fields are ignored.
    """
    _check(given, "temperature", lambda t: t == 0 or COOLEST <= t <= HOTTEST, _TEMPERATURE)
    _check(given, "top_p", lambda p: 0 < p <= 1, "a number above 0, at most 1")
    _check(given, "min_p", lambda p: 0 <= p <= 1, "a number from 0 to 1")
    _check(given, "top_k", lambda k: -1 <= k < 1 << 31, "a whole number, -1 for all", whole=True)
    for name in ("seed", "sampling_seed"):
        _check(
            given,
            name,
            lambda seed: -(1 << 63) <= seed < 1 << 63,
            "a whole number of at most 64 bits",
            whole=True,
        )


_TEMPERATURE = f"0 for greedy decoding, or a number from {COOLEST} to {HOTTEST:g}"


def _check(
    given: Mapping[str, Any], name: str, fits: Any, expected: str, *, whole: bool = False
) -> None:
    value = given.get(name)
    if value is None:
        return
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or not fits(value):
        raise L2PDError(f"{name}={shown(value)}: expected {expected}")


def wants_sampling(given: Mapping[str, Any]) -> bool:
    """Whether a request samples that says this much; the values are checked already."""
    if given.get("temperature") is not None:
        return bool(given["temperature"] > 0)
    return any(
        given.get(name) is not None and given[name] not in nothing
        for name, nothing in _NEUTRAL.items()
    )


def sampling_of(
    params: Mapping[str, Any],
    *,
    seed: int | None,
    request_id: str,
    vocabulary: int,
    asked: bool,
    defaults: Mapping[str, Any],
) -> Sampling | None:
    """How a request samples, in an engine's worker; None if it decodes greedily.

    Args:
        params: `FIELDS` as the engine has completed them.
        request_id: seeds a request without a seed: the same on every rank.
        vocabulary: number of tokens; a top_k of as many keeps all.
        asked: whether an endpoint has found that the client asks for sampling. Otherwise it does
            if a value is not the engine's, or if it has a seed.
        defaults: the checkpoint's own values, which the engine fills in.
    """
    temperature: float = params["temperature"]
    top_k: int = params["top_k"]
    if temperature == 0 or top_k == 1:
        return None
    top_k = 0 if top_k >= vocabulary else max(top_k, 0)
    said = asked or seed is not None or temperature not in (1, defaults.get("temperature"))
    for name, neutral in (("top_p", 1), ("min_p", 0)):
        said = said or params[name] not in (neutral, defaults.get(name))
    if not said and top_k in (0, defaults.get("top_k")):
        return None
    return Sampling(
        seed=seed_of(request_id) if seed is None else seed,
        temperature=temperature,
        top_k=top_k,
        top_p=params["top_p"],
        min_p=params["min_p"],
    )


def seed_of(request_id: str) -> int:
    """A seed that follows from the id of a request, of 53 bits, which every JSON reader keeps."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") >> 11


def check_top(name: str, value: Any) -> None:
    """Raise L2PDError for a number of most probable tokens that is out of bounds."""
    _check(
        {name: value}, name, lambda top: 0 <= top <= MOST_TOP, f"0 to {MOST_TOP} tokens", whole=True
    )


def check_log_probabilities(body: Mapping[str, Any], *, chat: bool) -> None:
    """Raise L2PDError, which names the field, for what OpenAI's API cannot ask for.
    chat: whether the body is of a chat, where `logprobs` is a flag and `top_logprobs` the number.
    """
    wanted = body.get("logprobs")
    if not chat:
        check_top("logprobs", wanted)
        if wanted is not None and body.get("echo"):
            raise L2PDError("echo=True: a prompt has no log-probabilities; leave logprobs out")
        return
    if wanted not in (None, 0) and wanted is not True:
        raise L2PDError(f"logprobs={shown(wanted)}: expected true or false")
    check_top("top_logprobs", body.get("top_logprobs"))
    if body.get("top_logprobs") and not wanted:
        raise L2PDError(f"top_logprobs={shown(body['top_logprobs'])}: expected logprobs, too")
