"""Admission: a request is checked before it is queued; an invalid one gets HTTP 400."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.sampling_params import SamplingParams

from l2pd_adapters import metrics
from l2pd_adapters.admission import ANY_FAILURE, reason_of
from l2pd_adapters.request_fields import typed_body
from l2pd_adapters.request_sampling import ASKED, FIELDS, wants_sampling
from l2pd_adapters.vllm import refusals
from l2pd_adapters.vllm.compatibility import incompatibility_of_server
from l2pd_adapters.vllm.settings import DiffusionGemmaServer, VllmServer, settings_of
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.shown_values import shown

logger = logging.getLogger(__name__)


def install() -> None:
    """Make vLLM call the checks here for requests to diffusion language models
    (`SamplingParams._validate_diffusion`).
    """
    stock = SamplingParams._validate_diffusion
    if getattr(stock, "_l2pd", False):
        return

    @functools.wraps(stock)
    def validate(self: SamplingParams, model_config: Any) -> None:
        settings = settings_of(model_config)
        if settings is None:
            if model_config.is_diffusion:
                with _answered():
                    refusals.check_names_no_policy(self, model_config)
            stock(self, model_config)
        elif isinstance(settings, DiffusionGemmaServer):
            stock(self, model_config)
            check_noise(self, settings)
        else:
            check(self, model_config, settings)

    validate._l2pd = True  # type: ignore[attr-defined]
    SamplingParams._validate_diffusion = validate
    _install_in_servers()


def _install_in_servers() -> None:
    """vLLM validates a request when its first output is awaited; for a stream this is after HTTP
    200 has been sent. This makes a server of one of our models validate it when `generate` is
    called.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    begin = InputProcessor.__init__

    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if settings_of(self.model_config) is not None:
            from l2pd_adapters.vllm import metrics as endpoint

            endpoint.install()
        # Importing it here would be too early, and unnecessary in a process without a server.
        server = sys.modules.get("vllm.v1.engine.async_llm")
        if server is not None and settings_of(self.model_config) is not None:
            problem = incompatibility_of_server()
            if problem:
                raise L2PDError(f"{self.model_config.model} cannot be served: {problem}")
            metrics.activate()
            logger.info("metrics of the policies: l2pd_* on /metrics, beside vLLM's")
            _validate_when_called(server.AsyncLLM)
            _refuse_beam_search()
            _check_what_was_typed()

    InputProcessor.__init__ = __init__


def _validate_when_called(engine_class: Any) -> None:
    generate = engine_class.generate
    if hasattr(generate, "_l2pd"):
        return

    @functools.wraps(generate)
    def validated(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        if settings_of(self.model_config) is not None:
            processor = self.input_processor
            processor._validate_params(sampling_params, ("generate",))
            if isinstance(prompt, dict) and "type" in prompt:  # otherwise it is not tokenised yet
                processor._validate_model_input(prompt, "decoder")
        return generate(self, prompt, sampling_params, *args, **kwargs)

    validated._l2pd = True  # type: ignore[attr-defined]
    engine_class.generate = validated


def _refuse_beam_search() -> None:
    """Refuse beam search: it needs log-probabilities for each token."""
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

    search = BeamSearchOnlineMixin.beam_search
    if hasattr(search, "_l2pd"):
        return

    @functools.wraps(search)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        if settings_of(self.engine_client.model_config) is not None:
            metrics.refused("parameter")
            raise VLLMValidationError(
                "use_beam_search=True is not supported with diffusion language models"
            )
        return search(self, *args, **kwargs)

    beam_search._l2pd = True  # type: ignore[attr-defined]
    BeamSearchOnlineMixin.beam_search = beam_search


def _check_what_was_typed() -> None:
    """Refuse fields without effect by the names that the client typed, before anything is
    rendered.
    """
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    _check_before(OpenAIServingChat, "create_chat_completion", "chat")
    _check_before(OpenAIServingChatBatch, "create_batch_chat_completion", "chat")
    _check_before(OpenAIServingCompletion, "create_completion", "completions")
    _check_before(OpenAIServingResponses, "create_responses", "responses")
    for method in ("create_messages", "count_tokens"):
        _answer_instead_of_raising(AnthropicServingMessages, method)


def _answer_instead_of_raising(serving: Any, method: str) -> None:
    """Have a method return its errors of requests: Anthropic's endpoints log what is raised as a
    fault of the server."""
    create = getattr(serving, method)
    if hasattr(create, "_l2pd"):
        return

    @functools.wraps(create)
    async def answering(self: Any, request: Any, raw_request: Any = None) -> Any:
        try:
            return await create(self, request, raw_request)
        except (ValueError, VLLMClientError) as error:
            return self.create_error_response(error)

    answering._l2pd = True  # type: ignore[attr-defined]
    setattr(serving, method, answering)


def _check_before(serving: Any, method: str, endpoint: refusals.Endpoint) -> None:
    create = getattr(serving, method)
    if hasattr(create, "_l2pd"):
        return

    @functools.wraps(create)
    async def checked(self: Any, request: Any, raw_request: Any = None) -> Any:
        model_config = self.engine_client.model_config
        settings = settings_of(model_config)
        if settings is not None and not isinstance(settings, DiffusionGemmaServer):
            body = await typed_body(raw_request)
            with _answered():
                refusals.check_typed(body, endpoint, model_config.get_diff_sampling_param())
            _complete(request)
        response = await create(self, request, raw_request)
        if settings is not None:
            from l2pd_adapters.vllm.metrics import tell

            tell(response, request, settings)
        return response

    checked._l2pd = True  # type: ignore[attr-defined]
    setattr(serving, method, checked)


def _complete(request: Any) -> None:
    """Let a request of OpenAI's API that says nothing about sampling decode greedily, where vLLM
    would sample at temperature 1; mark the others for the worker.
    """
    said = {name: getattr(request, name) for name in FIELDS if name in request.model_fields_set}
    if not wants_sampling(said):
        request.temperature = 0.0
        return
    # A batch of chats does not declare this field: it hands on any value.
    given = getattr(request, "vllm_xargs", None) or {}
    if isinstance(given, Mapping):
        request.vllm_xargs = {**given, ASKED: 1}


def check(params: SamplingParams, model_config: Any, settings: VllmServer) -> None:
    """Raise VLLMValidationError, which names the choices, for an unsupported request."""
    of_the_model = model_config.get_diff_sampling_param()
    with _answered():
        refusals.check(params, of_the_model, model_config.model, settings)


def check_noise(params: SamplingParams, settings: DiffusionGemmaServer) -> None:
    """As `check`, for parameters that vLLM itself does not refuse for DiffusionGemma."""
    with _answered():
        refusals.check_noise(params, settings)


@contextmanager
def _answered() -> Iterator[None]:
    """Whatever is raised in here vLLM answers with HTTP 400, and the metrics count it."""
    try:
        yield
    except L2PDError as error:
        metrics.refused(reason_of(error))
        raise VLLMValidationError(str(error)) from error
    except ANY_FAILURE as error:  # refuse the request instead of ending the server
        metrics.refused(reason_of(error))
        logger.exception("a request cannot be admitted")
        said = f"{type(error).__name__}: {shown(str(error))}"
        raise VLLMValidationError(f"the request cannot be admitted: {said}") from error
