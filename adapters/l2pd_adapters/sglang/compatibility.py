"""The SGLang internals that this adapter uses, and a check that they are unchanged.

Every SGLang name that the adapter uses is listed here, so that a server does not start where one
is missing (tests/adapters/test_compatibility.py reads the adapter's source).
"""

from __future__ import annotations

from l2pd_adapters.engines import SGLANG, Signature
from l2pd_adapters.request_sampling import FIELDS

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
FIND_ALGORITHM = "sglang.srt.dllm.algorithm.get_algorithm_cls"
READ_CONFIG = "sglang.srt.dllm.config.DllmConfig.from_server_args"
REPORT = f"{_MANAGER}.update_request_meta_info"
INIT = f"{_MANAGER}.__init__"
GENERATE = f"{_MANAGER}.generate_request"
_SCHEDULER = "sglang.srt.dllm.mixin.scheduler.SchedulerDllmMixin"
FETCH_WAITING = f"{_SCHEDULER}._fetch_waiting_reqs"
VALIDATE = f"{_SCHEDULER}.validate_dllm_request"
EMITTED = f"{_SCHEDULER}._finish_dllm_request_if_needed"
REMAINING_TOKENS = "sglang.srt.managers.schedule_policy.PrefillAdder._get_dllm_remain_tokens"
"""The functions that `plugin` hooks."""

HTTP = "sglang.srt.entrypoints.http_server"
"""The module of a running HTTP server; no other process imports it."""

_BASE = "sglang.srt.dllm.algorithm.base.DllmAlgorithm"
SIGNATURES: dict[str, Signature] = {
    FIND_ALGORITHM: ("name",),
    READ_CONFIG: ("server_args",),
    REPORT: ("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
    f"{_MANAGER}.add_logprob_to_meta_info": (
        "self",
        "meta_info",
        "state",
        "top_logprobs_num",
        "token_ids_logprob",
        "return_text_in_logprobs",
        "finished",
    ),
    INIT: ("self", "server_args", "..."),
    GENERATE: ("self", "obj", "request"),
    FETCH_WAITING: ("self",),
    VALIDATE: ("self", "req"),
    EMITTED: ("self", "req"),
    REMAINING_TOKENS: ("self", "req"),
    _BASE: ("config",),
    f"{_BASE}.validate_request": ("req",),
    f"{_BASE}._block_start_list": ("self", "forward_batch"),
    f"{_BASE}.init_step_state": ("self", "forward_batch"),
    f"{_BASE}.prepare_inputs": ("self", "model_runner", "forward_batch", "states"),
    f"{_BASE}.step": [
        ("self", "forward_batch", "full_logits", "states"),
        ("self", "forward_batch", "logits_output", "states"),  # SGLang's main branch
    ],
}
"""SGLang functions that are called or overridden, with their parameters."""

NAMES: dict[str, tuple[str, ...]] = {
    "sglang.srt.arg_groups.overrides": ("resolving_view",),
    "sglang.srt.configs.model_config": ("ModelConfig",),
    "sglang.srt.configs.model_config.ModelConfig": (
        "context_len",
        "from_server_args",
        "get_default_sampling_params",
        "hf_config",
        "hf_eos_token_id",
        "hf_generation_config",
        "model_path",
        "vocab_size",
    ),
    "sglang.srt.dllm.algorithm": ("algo_name_to_cls",),
    "sglang.srt.dllm.algorithm.base": ("DllmAlgorithm",),
    _BASE: ("block_size", "fdfo", "mask_id"),
    "sglang.srt.dllm.config": ("DllmConfig",),
    "sglang.srt.dllm.config.DllmConfig": (
        "algorithm",
        "algorithm_config",
        "block_size",
        "mask_id",
        "max_running_requests",
        "requires_separate_context_encoding",
    ),
    _SCHEDULER: ("dllm_config", "dllm_manager"),
    "sglang.srt.dllm.mixin.scheduler.DllmManager": ("add_waiting_reqs", "waiting_queue"),
    "sglang.srt.environ": ("envs",),
    "sglang.srt.environ.Envs": ("SGLANG_ENABLE_REQUEST_DECOMPRESSION", "SGLANG_RUST_SERVER"),
    "sglang.srt.managers.io_struct.GenerateReqInput": (
        "input_ids",
        "logprob_start_len",
        "return_logprob",
        "return_text_in_logprobs",
        "sampling_params",
        "stream",
        "token_ids_logprob",
        "top_logprobs_num",
    ),
    _MANAGER: ("skip_tokenizer_init", "tokenizer"),
    "sglang.srt.managers.tokenizer_manager.ReqState": (
        "obj",
        "output_token_logprobs_idx",
        "output_token_logprobs_val",
        "output_top_logprobs_idx",
        "output_top_logprobs_val",
    ),
    "sglang.srt.managers.schedule_policy.PrefillAdder": (
        "dllm_block_size",
        "dllm_config",
        "rem_dllm_tokens",
    ),
    "sglang.srt.constants": ("HEALTH_CHECK_RID_PREFIX",),
    "sglang.srt.managers.scheduler.Scheduler": (
        "max_total_num_tokens",
        "metrics_reporter",
        "page_size",
        "waiting_queue",
    ),
    "sglang.srt.managers.schedule_batch": ("FINISH_ABORT",),
    "sglang.srt.managers.schedule_batch.Req": (
        "customized_info",
        "dllm_config",
        "finished",
        "finished_reason",
        "full_untruncated_fill_ids",
        "logprob",
        "origin_input_ids",
        "output_ids",
        "output_ids_through_stop",
        "return_logprob",
        "rid",
        "sampling_params",
        "to_finish",
    ),
    "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter": (
        "current_scheduler_metrics_enabled",
    ),
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": (
        "batch_size",
        "input_ids",
        "rids",
        "seq_lens_cpu",
    ),
    "sglang.srt.plugins.hook_registry": ("HookRegistry", "HookType"),
    "sglang.srt.plugins.hook_registry.HookRegistry": ("register",),
    "sglang.srt.plugins.hook_registry.HookType": ("AROUND",),
    "sglang.srt.sampling.sampling_params": ("SamplingParams",),
    "sglang.srt.sampling.sampling_params.SamplingParams": (
        "custom_params",
        "ignore_eos",
        "max_new_tokens",
        *FIELDS,
        "sampling_seed",
        "verify",
    ),
    "sglang.srt.server_args.ServerArgs": (
        "admin_api_key",
        "api_key",
        "dllm_algorithm",
        "enable_metrics",
        "grpc_mode",
        "grpc_port",
        "model_path",
        "revision",
        "smg_grpc_mode",
        "tokenizer_worker_num",
    ),
}
"""SGLang modules and classes, with the names in them that are used."""

_OPENAI = "sglang.srt.entrypoints.openai"
_ANTHROPIC = "sglang.srt.entrypoints.anthropic.serving.AnthropicServing"
HTTP_SIGNATURES: dict[str, Signature] = {
    f"{HTTP}.serve_generate_request": ("obj", "request"),
    f"{HTTP}._create_error_response": ("e",),
    f"{_OPENAI}.serving_base.OpenAIServingBase.handle_request": ("self", "request", "raw_request"),
    f"{_ANTHROPIC}.handle_messages": ("self", "request", "raw_request"),
    f"{_ANTHROPIC}.handle_count_tokens": ("self", "request", "raw_request"),
}
"""The same of the HTTP server's modules, which are looked at where they run."""

HTTP_NAMES: dict[str, tuple[str, ...]] = {
    HTTP: ("ORJSONResponse", "app"),
    "starlette.applications.Starlette": ("add_middleware",),
    f"{_OPENAI}.protocol.ChatCompletionRequest": (
        "custom_params",
        "model_fields_set",
        "temperature",
    ),
    f"{_OPENAI}.serving_base": ("OpenAIServingBase",),
    f"{_OPENAI}.serving_base.OpenAIServingBase": ("create_error_response", "tokenizer_manager"),
    f"{_OPENAI}.serving_chat": ("OpenAIServingChat",),
    f"{_OPENAI}.serving_completions": ("OpenAIServingCompletion",),
    f"{_OPENAI}.serving_completions.OpenAIServingCompletion": ("template_manager",),
    "sglang.srt.parser.template_manager.TemplateManager": ("completion_template_name",),
    "sglang.srt.entrypoints.anthropic.serving": ("AnthropicServing",),
    _ANTHROPIC: ("_error_response", "openai_serving_chat"),
    "starlette.responses.StreamingResponse": ("body_iterator",),
}


def incompatibility() -> str:
    """Why this adapter cannot run on the installed SGLang, in one line; empty if it can."""
    return SGLANG.incompatibility(SIGNATURES, NAMES)


def incompatibility_of_http() -> str:
    """As `incompatibility`, for a process that runs SGLang's HTTP server."""
    return SGLANG.incompatibility(HTTP_SIGNATURES, HTTP_NAMES)
