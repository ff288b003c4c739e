"""The endpoints of SGLang's HTTP server: an invalid request is refused there by the names that the
client typed, and before a stream has begun.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from l2pd_adapters.body_limit import BodyLimit
from l2pd_adapters.request_fields import typed_body
from l2pd_adapters.request_sampling import ASKED, FIELDS, wants_sampling
from l2pd_adapters.sglang import admission
from l2pd_adapters.sglang.refusals import Endpoint, check_typed

_EVENT = b"data: "


def install(module: ModuleType, manager: Any) -> None:
    """Check requests to /generate, /v1/chat/completions and /v1/completions. module: SGLang's HTTP
    server; manager: its TokenizerManager, with `l2pd`.
    """
    from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase

    _limit_bodies(module.app, manager.l2pd.admission.request_body_mib)
    answer: Any = module.serve_generate_request  # type: ignore[attr-defined]
    if not hasattr(answer, "_l2pd"):
        ours: Any = functools.wraps(answer)(functools.partial(_generate, module, manager, answer))
        ours._l2pd = True
        module.serve_generate_request = ours  # type: ignore[attr-defined]
    handle: Any = OpenAIServingBase.handle_request
    if not hasattr(handle, "_l2pd"):

        @functools.wraps(handle)
        async def handle_request(self: Any, request: Any, raw_request: Any) -> Any:
            return await _openai(handle, self, request, raw_request)

        handle_request._l2pd = True  # type: ignore[attr-defined]
        OpenAIServingBase.handle_request = handle_request


def _limit_bodies(app: Any, mib: int) -> None:
    if app.middleware_stack is None:
        app.add_middleware(BodyLimit, mib=mib)
    else:  # a tokenizer's worker, whose application has started
        app.middleware_stack = BodyLimit(app.middleware_stack, mib=mib)


async def _generate(
    module: Any, manager: Any, original: Callable[..., Any], obj: Any, request: Any
) -> Any:
    """/generate. SGLang itself would validate a stream only after HTTP 200 has been sent."""
    body, settings = await typed_body(request), manager.l2pd

    def check() -> None:
        check_typed(body, "generate", settings)
        admission.check(obj, settings)

    problem = admission.problem_of(check)
    if problem is not None:
        return module._create_error_response(ValueError(problem))
    response = await original(obj, request)
    return await _refused_in_time(module, response) if obj.stream else response


async def _openai(original: Callable[..., Any], serving: Any, request: Any, raw: Any) -> Any:
    """The endpoints of OpenAI's API; those that generate no text are not checked."""
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion

    settings = getattr(serving.tokenizer_manager, "l2pd", None)
    endpoint: Endpoint | None = None
    honoured: Sequence[str] = ()
    if isinstance(serving, OpenAIServingChat):
        endpoint = "chat"
    elif isinstance(serving, OpenAIServingCompletion):
        endpoint = "completions"
        if serving.template_manager.completion_template_name is not None:
            honoured = ["suffix"]  # which the template has a place for
    if settings is not None and endpoint is not None:
        body = await typed_body(raw)
        problem = admission.problem_of(
            functools.partial(check_typed, body, endpoint, settings, honoured=honoured)
        )
        if problem is not None:
            return serving.create_error_response(problem)
        said = {name: getattr(request, name) for name in FIELDS if name in request.model_fields_set}
        if wants_sampling(said):
            request.custom_params = {**(request.custom_params or {}), ASKED: True}
        else:
            request.temperature = 0.0  # SGLang fills in 1
    return await original(serving, request, raw)


async def _refused_in_time(module: Any, response: Any) -> Any:
    """A streamed response, or SGLang's error if that is its first event. SGLang would send HTTP
    200 before it has looked at the request.
    """
    events = response.body_iterator
    first = await anext(events, None)
    problem = _error_in(first)
    if problem is not None:
        return module.ORJSONResponse({"error": problem}, status_code=_status_of(problem))

    async def all_events() -> AsyncIterator[Any]:
        if first is not None:
            yield first
        async for event in events:
            yield event

    response.body_iterator = all_events()
    return response


def _error_in(event: Any) -> Any:
    """The error of an event of a stream, or None."""
    if not isinstance(event, bytes) or not event.startswith(_EVENT + b'{"error"'):
        return None
    return json.loads(event.removeprefix(_EVENT)).get("error")


def _status_of(problem: Any) -> int:
    code = problem.get("code") if isinstance(problem, Mapping) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 400
