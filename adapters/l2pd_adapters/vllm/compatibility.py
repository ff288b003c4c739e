"""The vLLM internals that this adapter uses, and a check that they are unchanged."""

from __future__ import annotations

from l2pd_adapters.engines import VLLM

_STATE = "vllm.v1.worker.gpu.model_states.interface.ModelState"
_SCHEDULER = "vllm.v1.core.sched.diffusion_scheduler.DiffusionScheduler"
_PROCESSOR = "vllm.v1.engine.input_processor.InputProcessor"
_ADJUSTMENTS = "vllm.model_executor.models.config.VerifyAndUpdateConfig"

SIGNATURES = {
    "vllm.sampling_params.SamplingParams._validate_diffusion": ("self", "model_config"),
    f"{_PROCESSOR}._validate_params": ("self", "params", "supported_tasks"),
    f"{_PROCESSOR}._validate_model_input": ("self", "prompt_input", "prompt_type"),
    "vllm.engine.arg_utils.EngineArgs.add_cli_args": ("parser",),
    "vllm.engine.arg_utils.EngineArgs.from_cli_args": ("args",),
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
}
"""vLLM functions that are called or overridden, with their parameters."""

FIELDS = {
    "vllm.v1.worker.gpu.input_batch.InputBatch": (
        "num_reqs",
        "idx_mapping",
        "idx_mapping_np",
        "query_start_loc",
        "query_start_loc_np",
        "cu_num_logits",
        "cu_num_logits_np",
        "expanded_idx_mapping",
        "expanded_local_pos",
        "logits_indices",
        "prefill_len_np",
        "seq_lens",
        "num_draft_tokens",
    ),
    "vllm.v1.worker.gpu.sample.output.SamplerOutput": (
        "sampled_token_ids",
        "num_sampled",
        "num_rejected",
    ),
    "vllm.config.diffusion.DiffusionConfig": ("canvas_length",),
}
"""vLLM dataclasses, with the fields that are read or written."""


_DIFFUSION_GEMMA = "vllm.model_executor.models.diffusion_gemma"

DIFFUSION_GEMMA_SIGNATURES = {
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


def incompatibility() -> str:
    """Why this adapter cannot run on the installed vLLM, in one line; empty if it can."""
    return VLLM.incompatibility(SIGNATURES, FIELDS)


def incompatibility_of_diffusion_gemma() -> str:
    """As `incompatibility`, for a policy in the sampler of DiffusionGemma."""
    signatures = {**SIGNATURES, **DIFFUSION_GEMMA_SIGNATURES}
    return VLLM.incompatibility(signatures, FIELDS)
