"""vLLM's own models under the names of diffusion language models' checkpoints."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from l2pd_adapters.vllm.model_state import BidirectionalState, BlockCausalState, DiffusionState


class SDARForCausalLM(Qwen3ForCausalLM):
    """SDAR: block-causal, on Qwen3."""

    @staticmethod
    def get_model_state_cls() -> type[DiffusionState]:
        return BlockCausalState


class _Bidirectional:
    """Sees prompt and canvas; hands out the hidden states of the block that is being decoded."""

    @staticmethod
    def get_model_state_cls() -> type[DiffusionState]:
        return BidirectionalState

    def forward(self, *args: Any, hidden_rows: Tensor | None = None, **kwargs: Any) -> Any:
        hidden = super().forward(*args, **kwargs)  # type: ignore[misc]
        if hidden_rows is None or not isinstance(hidden, Tensor):  # a stage of a pipeline
            return hidden
        return hidden.index_select(0, hidden_rows)


class BidirectionalQwen3(_Bidirectional, Qwen3ForCausalLM):
    """A bidirectional model on Qwen3."""


class BidirectionalLlama(_Bidirectional, LlamaForCausalLM):
    """A bidirectional model on Llama."""
