"""The endpoints of SGLang's HTTP server: an invalid request is refused there by the names that the
client typed, and before a stream has begun.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from l2pd_adapters.prompt_size import check_prompt_size, longest_token
from l2pd_adapters.request_fields import typed_body
from l2pd_adapters.request_sampling import ASKED, FIELDS, wants_sampling
from l2pd_adapters.sglang import admission
from l2pd_adapters.sglang.compressed_bodies import DecompressingGuard
from l2pd_adapters.sglang.paths import Doors
from l2pd_adapters.sglang.refusals import Endpoint, check_typed
from l2pd_adapters.sglang.settings import SglangServer

_EVENT = b"data: "


def install(module: ModuleType, manager: Any, doors: Doors) -> None:
    """Guard SGLang's HTTP server, and check requests to its paths that generate text. module: the
    server's; manager: its TokenizerManager, with `l2pd`; doors: which paths are open.
    """
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
    from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase

    _guard(module.app, manager.l2pd, doors)
    _wrap(module, "serve_generate_request", functools.partial(_generate, module, manager))
    _wrap(OpenAIServingBase, "handle_request", _openai)
    _wrap(AnthropicServing, "handle_messages", functools.partial(_anthropic, True))
    _wrap(AnthropicServing, "handle_count_tokens", functools.partial(_anthropic, False))


def _guard(app: Any, settings: SglangServer, doors: Doors) -> None:
    rules = settings.admission
    app.add_middleware(
        DecompressingGuard,
        mib=rules.request_body_mib,
        values=rules.body_values(settings.canvas),
        closed=doors,
    )


def _wrap(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Have `ours` called in place of a function, with that function as its first argument."""
    original = getattr(owner, name)
    if hasattr(original, "_l2pd"):
        return

    @functools.wraps(original)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        return await ours(original, *args, **kwargs)

    wrapped._l2pd = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


async def _generate(
    module: Any, manager: Any, original: Callable[..., Any], obj: Any, request: Any
) -> Any:
    """/generate. SGLang itself would validate a stream only after HTTP 200 has been sent."""
    body, settings = await typed_body(request), manager.l2pd

    def check() -> None:
        check_prompt_size(body, settings.canvas, longest_token(manager.tokenizer))
        check_typed(body, "generate", settings)
        admission.check(obj, settings)

    problem = admission.problem_of(check)
    if problem is not None:
        return module._create_error_response(ValueError(problem))
    response = await original(obj, request)
    return await _refused_in_time(module, response) if obj.stream else response


async def _openai(original: Callable[..., Any], serving: Any, request: Any, raw: Any) -> Any:
    """The endpoints of OpenAI's API; of those that generate no text only the size is checked."""
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
    if settings is not None:
        body = await typed_body(raw)

        def check() -> None:
            longest = longest_token(serving.tokenizer_manager.tokenizer)
            # SGLang tokenises a list of texts at once where it does nothing else.
            check_prompt_size(body, settings.canvas, longest, at_once=endpoint is None)
            if endpoint is not None:
                check_typed(body, endpoint, settings, honoured=honoured)

        problem = admission.problem_of(check)
        if problem is not None:
            return serving.create_error_response(problem)
    if settings is not None and endpoint is not None:
        if wants_sampling(_said(request)):
            request.custom_params = {**(request.custom_params or {}), ASKED: True}
        else:
            request.temperature = 0.0  # SGLang fills in 1
    return await original(serving, request, raw)


def _said(request: Any) -> dict[str, Any]:
    """What a request's client has said about sampling."""
    return {name: getattr(request, name) for name in FIELDS if name in request.model_fields_set}


async def _anthropic(
    generates: bool, original: Callable[..., Any], serving: Any, request: Any, raw: Any
) -> Any:
    """Anthropic's API, which SGLang translates to that of OpenAI. generates: whether the answer is
    a text, and not a number of tokens."""
    manager = serving.openai_serving_chat.tokenizer_manager
    settings = getattr(manager, "l2pd", None)
    if settings is not None:
        body = await typed_body(raw)

        def check() -> None:
            check_prompt_size(body, settings.canvas, longest_token(manager.tokenizer))
            if generates:
                check_typed(body, "messages", settings)

        problem = admission.problem_of(check)
        if problem is not None:
            return serving._error_response(
                status_code=400, error_type="invalid_request_error", message=problem
            )
        if generates:
            request.temperature = 0.0  # a client may have said 1, Anthropic's default
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
