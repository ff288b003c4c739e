"""The SGLang internals that this adapter uses, and a check that they are unchanged."""

from __future__ import annotations

from l2pd_adapters.engines import SGLANG

FIND_ALGORITHM = "sglang.srt.dllm.algorithm.get_algorithm_cls"
READ_CONFIG = "sglang.srt.dllm.config.DllmConfig.from_server_args"
REPORT = "sglang.srt.managers.tokenizer_manager.TokenizerManager.update_request_meta_info"
INIT = "sglang.srt.managers.tokenizer_manager.TokenizerManager.__init__"
GENERATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
"""The functions that `plugin` hooks."""

HTTP = "sglang.srt.entrypoints.http_server"
"""The module of a running HTTP server; no other process imports it."""

_BASE = "sglang.srt.dllm.algorithm.base.DllmAlgorithm"
SIGNATURES = {
    FIND_ALGORITHM: ("name",),
    READ_CONFIG: ("server_args",),
    REPORT: ("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
    GENERATE: ("self", "obj", "request"),
    _BASE: ("config",),
    f"{_BASE}.validate_request": ("req",),
    f"{_BASE}._block_start_list": ("self", "forward_batch"),
    f"{_BASE}.init_step_state": ("self", "forward_batch"),
    f"{_BASE}.prepare_inputs": ("self", "model_runner", "forward_batch", "states"),
    f"{_BASE}.step": ("self", "forward_batch", "full_logits", "states"),
}
"""SGLang functions that are called or overridden, with their parameters."""

FIELDS = {
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": (
        "batch_size",
        "input_ids",
        "rids",
        "seq_lens_cpu",
    ),
}
"""SGLang dataclasses, with the fields that are read or written."""


def incompatibility() -> str:
    """Why this adapter cannot run on the installed SGLang, in one line; empty if it can."""
    return SGLANG.incompatibility(SIGNATURES, FIELDS)
