"""Admission: a request is checked before it is queued.

SGLang lets an algorithm validate a request only in the scheduler's process, when a stream may have
begun and other requests wait. So requests are checked here first, in the process that handles HTTP:
an invalid request, streaming or not, gets HTTP 400 and never reaches the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from sglang.srt.sampling.sampling_params import SamplingParams

from l2pd_adapters import metrics
from l2pd_adapters.admission import ANY_FAILURE, reason_of
from l2pd_adapters.request_sampling import ASKED, check_sampling, wants_sampling
from l2pd_adapters.sglang.refusals import check_effects, check_ids, check_input
from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown_values import shown


def problem_of(check: Callable[[], None]) -> str | None:
    """What a check says against a request, or None; the metrics count it as refused. Any other
    failure in it is caused by the request, too.
    """
    try:
        check()
    except L2PDError as error:
        metrics.refused(reason_of(error))
        return str(error)
    except ANY_FAILURE as error:
        metrics.refused(reason_of(error))
        return f"the request cannot be read: {type(error).__name__}: {shown(str(error))[1:-1]}"
    return None


def check(request: Any, settings: SglangServer) -> None:
    """Check a GenerateReqInput as the client has sent it. Raises L2PDError, which names the
    parameter, if it is not supported.
    """
    given = request.sampling_params
    for params in given if isinstance(given, list) else [{} if given is None else given]:
        check_params(params, settings)
    check_input(request)
    if request.input_ids is not None:
        check_ids(request.input_ids, settings.model.vocab_size)


def complete(request: Any) -> None:
    """Let a GenerateReqInput that says nothing about sampling decode greedily, where SGLang would
    sample at temperature 1; mark the others for the scheduler. Called after `check`.
    """
    given = request.sampling_params
    if isinstance(given, list):
        request.sampling_params = [_completed({} if each is None else each) for each in given]
    else:
        request.sampling_params = _completed({} if given is None else given)


def _completed(params: Mapping[str, Any]) -> dict[str, Any]:
    if wants_sampling(params):
        return {**params, "custom_params": {**(params.get("custom_params") or {}), ASKED: True}}
    return {**params, "temperature": 0.0}


def check_params(params: Any, settings: SglangServer) -> None:
    """Raise L2PDError, which names the parameter, for unsupported sampling parameters."""
    if not isinstance(params, Mapping):
        raise L2PDError(f"sampling_params={shown(params)}: expected names and values")
    fields = SamplingParams.__struct_fields__
    for name in params:
        if name not in fields:
            raise L2PDError(f"sampling_params: no parameter {shown(name)}")
    # Check the bounds before reading the whole value.
    settings.choose(params.get("custom_params"))
    rest = {name: value for name, value in params.items() if name != "custom_params"}
    check_sampling(rest)
    check_types(rest)
    try:
        SamplingParams(**rest).verify(settings.model.vocab_size)
    except ValueError as error:  # SGLang's own error, which for a stream it would report too late
        raise L2PDError(str(error)) from None
    check_effects(rest, settings)


def check_types(params: Mapping[str, Any]) -> None:
    """Raise L2PDError for values that would crash SGLang's scheduler."""
    for name, value in params.items():
        if value is None:
            continue
        try:
            made = SamplingParams(**{name: value})
            msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=SamplingParams)
        except ANY_FAILURE as error:  # SGLang does not catch its own errors here
            said = str(error).partition(" - at ")[0]
            raise L2PDError(f"{name}={shown(value)}: {shown(said)[1:-1]}") from None
