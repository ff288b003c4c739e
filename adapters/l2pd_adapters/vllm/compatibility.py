"""The vLLM internals that this adapter uses, and a check that they are unchanged.

Every vLLM name that the adapter uses is listed here, so that a model is not served where one
is missing (tests/adapters/test_compatibility.py reads the adapter's source). Left out are vLLM's
model classes: only a worker may import them, and the import of `models` names one that is missing.
"""

from __future__ import annotations

from l2pd_adapters.engines import VLLM, Signature
from l2pd_adapters.request_sampling import FIELDS
from l2pd_adapters.vllm.refusals import ASKS_FOR_NOTHING

_STATE = "vllm.v1.worker.gpu.model_states.interface.ModelState"
_SCHEDULER = "vllm.v1.core.sched.diffusion_scheduler.DiffusionScheduler"
_PROCESSOR = "vllm.v1.engine.input_processor.InputProcessor"
_ADJUSTMENTS = "vllm.model_executor.models.config.VerifyAndUpdateConfig"

SIGNATURES: dict[str, Signature] = {
    f"{_PROCESSOR}.__init__": ("self", "vllm_config", "..."),
    "vllm.sampling_params.SamplingParams._validate_diffusion": ("self", "model_config"),
    f"{_PROCESSOR}._validate_params": ("self", "params", "supported_tasks"),
    f"{_PROCESSOR}._validate_model_input": ("self", "prompt_input", "prompt_type"),
    "vllm.engine.arg_utils.EngineArgs.add_cli_args": ("parser",),
    "vllm.engine.arg_utils.EngineArgs.from_cli_args": ("args",),
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": ("self", "..."),
    f"{_ADJUSTMENTS}.verify_and_update_config": ("vllm_config",),
    f"{_ADJUSTMENTS}.verify_and_update_model_config": ("model_config",),
    _STATE: ("vllm_config", "model", "encoder_cache", "device"),
    f"{_STATE}.add_request": ("self", "req_index", "new_req_data"),
    f"{_STATE}.remove_request": ("self", "req_id"),
    f"{_STATE}.custom_sampler": ("self", "sampler"),
    f"{_STATE}.prepare_inputs": ("self", "input_batch", "req_states"),
    f"{_STATE}.prepare_attn": (
        "self",
        "input_batch",
        "cudagraph_mode",
        "block_tables",
        "slot_mappings",
        "attn_groups",
        "kv_cache_config",
        "for_capture",
        "ubatch_idx",
    ),
    f"{_SCHEDULER}.update_draft_token_ids": ("self", "draft_token_ids"),
    f"{_SCHEDULER}.schedule": ("self", "throttle_prefills"),
    f"{_SCHEDULER}.update_from_output": ("self", "scheduler_output", "model_runner_output"),
    "vllm.v1.engine.output_processor.OutputProcessor.process_outputs": (
        "self",
        "engine_core_outputs",
        "...",
    ),
    "vllm.v1.worker.gpu.async_utils.AsyncOutput": (
        "model_runner_output",
        "sampler_output",
        "num_sampled_tokens",
        "main_stream",
        "copy_stream",
        "...",
    ),
    "vllm.v1.worker.gpu.async_utils.async_copy_to_np": ("x",),
    "vllm.v1.worker.gpu.async_utils.stream": ("to_stream", "from_stream"),
}
"""vLLM functions that are called or overridden, with their parameters."""

NAMES: dict[str, tuple[str, ...]] = {
    "vllm": ("ModelRegistry",),
    "vllm.ModelRegistry": ("inspect_model_cls", "register_model"),
    "vllm.config": ("CacheConfig", "ModelConfig", "VllmConfig"),
    "vllm.config.CacheConfig": (
        "block_size",
        "enable_prefix_caching",
        "user_specified_block_size",
    ),
    "vllm.config.CompilationConfig": ("cudagraph_mode",),
    "vllm.config.ModelConfig": (
        "_architecture",
        "_model_info",
        "architectures",
        "get_diff_sampling_param",
        "get_vocab_size",
        "hf_config",
        "is_diffusion",
        "max_model_len",
        "model",
        "registry",
        "try_get_generation_config",
    ),
    "vllm.config.VllmConfig": (
        "additional_config",
        "cache_config",
        "compilation_config",
        "diffusion_config",
        "model_config",
        "scheduler_config",
    ),
    "vllm.config.compilation": ("CUDAGraphMode",),
    "vllm.config.compilation.CUDAGraphMode": (
        "FULL",
        "FULL_AND_PIECEWISE",
        "PIECEWISE",
        "has_full_cudagraphs",
    ),
    "vllm.config.diffusion": ("DiffusionConfig",),
    "vllm.config.diffusion.DiffusionConfig": ("canvas_length",),
    "vllm.config.scheduler": ("SchedulerConfig",),
    "vllm.config.scheduler.SchedulerConfig": (
        "DEFAULT_MAX_NUM_SEQS",
        "async_scheduling",
        "enable_chunked_prefill",
        "long_prefill_token_threshold",
        "max_num_batched_tokens",
        "max_num_scheduled_tokens",
        "max_num_seqs",
        "scheduler_cls",
    ),
    "vllm.engine.arg_utils": ("EngineArgs",),
    "vllm.engine.arg_utils.EngineArgs": ("additional_config",),
    "vllm.exceptions": ("VLLMClientError", "VLLMValidationError"),
    "vllm.logger": ("init_logger",),
    "vllm.model_executor.models.config": ("MODELS_CONFIG_MAP", "VerifyAndUpdateConfig"),
    "vllm.sampling_params": ("SamplingParams",),
    "vllm.sampling_params.SamplingParams": (
        *ASKS_FOR_NOTHING,
        *FIELDS,
        "eos_token_id",
        "extra_args",
        "ignore_eos",
        "logprobs",
        "max_tokens",
        "n",
        "seed",
        "stop_token_ids",
    ),
    "vllm.v1.core.sched.diffusion_scheduler": ("DiffusionAsyncScheduler", "DiffusionScheduler"),
    _SCHEDULER: ("add_request", "max_model_len", "num_spec_tokens", "requests"),
    "vllm.v1.core.sched.output": ("NewRequestData", "SchedulerOutput"),
    "vllm.v1.core.sched.output.NewRequestData": (
        "prefill_token_ids",
        "prompt_len",
        "req_id",
        "sampling_params",
    ),
    "vllm.v1.core.sched.output.SchedulerOutput": (
        "num_scheduled_tokens",
        "scheduled_spec_decode_tokens",
    ),
    "vllm.v1.core.block_pool.BlockPool": ("free_blocks",),
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": ("single_type_managers",),
    "vllm.v1.core.kv_cache_manager.KVCacheManager": ("coordinator",),
    "vllm.v1.core.sched.scheduler.Scheduler": (
        "current_step",
        "kv_cache_manager",
        "max_num_scheduled_tokens",
        "requests",
        "running",
        "vllm_config",
    ),
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager": (
        "block_pool",
        "block_size",
        "req_to_blocks",
    ),
    "vllm.v1.engine.EngineCoreOutput": ("kv_transfer_params", "new_token_ids", "request_id"),
    "vllm.v1.engine.EngineCoreOutputs": ("outputs",),
    "vllm.v1.engine.input_processor": ("InputProcessor",),
    _PROCESSOR: ("model_config",),
    "vllm.v1.engine.output_processor": ("OutputProcessor",),
    "vllm.v1.engine.output_processor.OutputProcessor": ("request_states",),
    "vllm.v1.engine.output_processor.RequestState": ("external_req_id",),
    "vllm.v1.outputs": ("DraftTokenIds", "LogprobsTensors", "ModelRunnerOutput"),
    "vllm.v1.outputs.DraftTokenIds": ("req_ids",),
    "vllm.v1.outputs.ModelRunnerOutput": ("req_ids", "sampled_token_ids"),
    "vllm.v1.request": ("Request",),
    "vllm.v1.request.Request": (
        "is_finished",
        "max_tokens",
        "next_decode_eligible_step",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "num_tokens_with_spec",
        "request_id",
        "sampling_params",
        "spec_token_ids",
    ),
    "vllm.v1.worker.gpu.async_utils": ("AsyncOutput", "async_copy_to_np", "stream"),
    "vllm.v1.worker.gpu.async_utils.AsyncOutput": ("get_output",),
    "vllm.v1.worker.gpu.attn_utils": ("build_attn_metadata",),
    "vllm.v1.worker.gpu.input_batch": ("InputBatch",),
    "vllm.v1.worker.gpu.input_batch.InputBatch": (
        "cu_num_logits",
        "cu_num_logits_np",
        "expanded_idx_mapping",
        "expanded_local_pos",
        "idx_mapping",
        "idx_mapping_np",
        "input_ids",
        "logits_indices",
        "num_draft_tokens",
        "num_reqs",
        "num_reqs_after_padding",
        "num_tokens",
        "num_tokens_after_padding",
        "positions",
        "prefill_len_np",
        "query_start_loc",
        "query_start_loc_np",
        "seq_lens",
        "seq_lens_cpu_upper_bound",
    ),
    "vllm.v1.worker.gpu.model_states.interface": ("ModelState",),
    _STATE: (
        "device",
        "get_supported_generation_tasks",
        "max_model_len",
        "max_num_reqs",
        "model_config",
        "num_new_sampled_tokens_per_step",
        "prepare_dummy_inputs",
        "prepare_inputs_embeds",
    ),
    "vllm.v1.worker.gpu.sample.output": ("SamplerOutput",),
    "vllm.v1.worker.gpu.sample.output.SamplerOutput": (
        "num_rejected",
        "num_sampled",
        "sampled_token_ids",
    ),
    "vllm.v1.worker.gpu.sample.sampler.Sampler": ("req_states",),
    "vllm.v1.worker.gpu.states": ("RequestState",),
    "vllm.v1.worker.gpu.states.RequestState": ("draft_tokens",),
}
"""vLLM modules and classes, with the names in them that are used."""

_ENGINE = "vllm.v1.engine.async_llm.AsyncLLM"
_BEAM_SEARCH = "vllm.entrypoints.generate.beam_search.online"

_CHAT = "vllm.entrypoints.openai.chat_completion.serving"
_MESSAGES = "vllm.entrypoints.anthropic.serving"
_BATCH = "vllm.entrypoints.openai.chat_completion.batch_serving"
_RESPONSES = "vllm.entrypoints.openai.responses.serving"
_COMPLETION = "vllm.entrypoints.openai.completion.serving"
SERVER_NAMES: dict[str, tuple[str, ...]] = {
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest": (
        "model_fields_set",
        "vllm_xargs",
    ),
    _ENGINE.rpartition(".")[0]: ("AsyncLLM",),
    _ENGINE: ("generate", "input_processor", "model_config"),
    _BEAM_SEARCH: ("BeamSearchOnlineMixin",),
    f"{_BEAM_SEARCH}.BeamSearchOnlineMixin": ("beam_search", "engine_client"),
    _MESSAGES: ("AnthropicServingMessages",),
    f"{_MESSAGES}.AnthropicServingMessages": (
        "count_tokens",
        "create_error_response",
        "create_messages",
    ),
    _BATCH: ("OpenAIServingChatBatch",),
    f"{_BATCH}.OpenAIServingChatBatch": ("create_batch_chat_completion",),
    _RESPONSES: ("OpenAIServingResponses",),
    f"{_RESPONSES}.OpenAIServingResponses": ("create_responses",),
    _CHAT: ("OpenAIServingChat",),
    f"{_CHAT}.OpenAIServingChat": ("create_chat_completion",),
    _COMPLETION: ("OpenAIServingCompletion",),
    f"{_COMPLETION}.OpenAIServingCompletion": ("create_completion",),
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionResponse": ("choices", "id"),
    "vllm.v1.worker.gpu.model_runner": ("AsyncOutput",),
}
"""The same of a server's modules, which are looked at in the process that runs one."""


_DIFFUSION_GEMMA = "vllm.model_executor.models.diffusion_gemma"

DIFFUSION_GEMMA_SIGNATURES: dict[str, Signature] = {
    f"{_DIFFUSION_GEMMA}.DiffusionGemmaModelState.custom_sampler": ("self", "sampler"),
    f"{_DIFFUSION_GEMMA}.DiffusionGemmaModelState.add_request": (
        "self",
        "req_index",
        "new_req_data",
    ),
    f"{_DIFFUSION_GEMMA}.DiffusionGemmaModelState.remove_request": ("self", "req_id"),
    f"{_DIFFUSION_GEMMA}.DiffusionSampler.__call__": (
        "self",
        "logits",
        "input_batch",
        "draft_logits",
    ),
    f"{_DIFFUSION_GEMMA}._denoise_temperature": (
        "step_tensor",
        "slots",
        "max_denoising_steps",
        "t_min",
        "t_max",
    ),
    f"{_DIFFUSION_GEMMA}._compiled_sample_step": (
        "new_tokens",
        "argmax_tokens",
        "token_entropy",
        "probs",
        "decode_slots",
        "decode_idx",
        "all_slots",
        "valid_canvas_len",
        "canvas",
        "argmax_canvas",
        "step_tensor",
        "is_encoder_phase",
        "confident_tensor",
        "sc_embeds",
        "embed_weight",
        "normalizer",
        "history",
        "history_len_tensor",
        "max_steps_tensor",
        "pin_mask",
        "seed_canvas",
        "read_only",
        "sampled",
        "num_sampled",
        "draft_tokens",
        "confidence_threshold",
        "vocab_size",
        "CL",
        "ST",
        "entropy_bound",
        "sc_vocab_start",
        "sc_vocab_end",
        "tp_size",
        "tp_group_name",
        "compute_sc",
    ),
}
"""The same for DiffusionGemma's module, which is imported only if this model is served."""

DIFFUSION_GEMMA_NAMES: dict[str, tuple[str, ...]] = {
    "vllm.model_executor.models": ("diffusion_gemma",),
    _DIFFUSION_GEMMA: (
        "DiffusionGemmaForConditionalGeneration",
        "DiffusionGemmaModelState",
        "DiffusionSampler",
        "_compiled_sample_step",
        "_denoise_temperature",
    ),
    f"{_DIFFUSION_GEMMA}.DiffusionGemmaModelState": ("_req_id_to_index",),
    f"{_DIFFUSION_GEMMA}.DiffusionGemmaRequestStates": (
        "canvas",
        "is_encoder_phase",
        "max_denoising_steps",
        "pin_mask",
        "step",
    ),
    f"{_DIFFUSION_GEMMA}.DiffusionSampler": (
        "diffusion_states",
        "entropy_bound",
        "req_states",
        "t_max",
        "t_min",
    ),
}
"""Names in DiffusionGemma's module."""


def incompatibility() -> str:
    """Why this adapter cannot run on the installed vLLM, in one line; empty if it can."""
    return VLLM.incompatibility(SIGNATURES, NAMES)


def incompatibility_of_server() -> str:
    """As `incompatibility`, for a process that runs a server."""
    return VLLM.incompatibility({}, SERVER_NAMES)


def incompatibility_of_diffusion_gemma() -> str:
    """As `incompatibility`, for a policy in the sampler of DiffusionGemma."""
    return VLLM.incompatibility(
        {**SIGNATURES, **DIFFUSION_GEMMA_SIGNATURES}, {**NAMES, **DIFFUSION_GEMMA_NAMES}
    )
