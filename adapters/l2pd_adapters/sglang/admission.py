"""What a request may ask for, said before it is queued.

SGLang asks an algorithm about a request in the scheduler's process, where a stream has begun and
everybody waits. So requests are checked here first, in the process that speaks HTTP: a wrong
request gets HTTP 400, for streams too, and never reaches the scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from sglang.srt.sampling.sampling_params import SamplingParams

from l2pd_adapters.admission import ANY_FAILURE
from l2pd_adapters.sglang.refusals import check_effects, check_ids, check_rest
from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown import shown


def check(request: Any, settings: SglangServer) -> None:
    """Of a GenerateReqInput as the client has sent it. Raises L2PDError, which names the parameter,
    for what cannot be granted."""
    given = request.sampling_params
    for params in given if isinstance(given, list) else [{} if given is None else given]:
        check_params(params, settings)
    check_rest(request)
    if request.input_ids is not None:
        check_ids(request.input_ids, settings.model.vocab_size)


def check_params(params: Any, settings: SglangServer) -> None:
    """Raise L2PDError for sampling parameters, by their names, that cannot be granted."""
    if not isinstance(params, Mapping):
        raise L2PDError(f"sampling_params={shown(params)}: expected names and values")
    fields = SamplingParams.__struct_fields__
    for name in params:
        if name not in fields:
            raise L2PDError(f"sampling_params: no parameter {shown(name)}")
    # Bounded before the whole is looked at.
    settings.choose(params.get("custom_params"))
    rest = {name: value for name, value in params.items() if name != "custom_params"}
    check_types(rest)
    try:
        SamplingParams(**rest).verify(settings.model.vocab_size)
    except ValueError as error:  # SGLang's own, which of a stream it would say too late
        raise L2PDError(str(error)) from None
    check_effects(rest, settings)


def check_types(params: Mapping[str, Any]) -> None:
    """Raise L2PDError for values that SGLang's scheduler could not read: it ends by them."""
    for name, value in params.items():
        if value is None:
            continue
        try:
            made = SamplingParams(**{name: value})
            msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=SamplingParams)
        except ANY_FAILURE as error:  # what SGLang raises here, it does not catch
            said = str(error).partition(" - at ")[0]
            raise L2PDError(f"{name}={shown(value)}: {shown(said)[1:-1]}") from None
