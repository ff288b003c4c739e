"""vLLM's own models, under the architecture names of diffusion language models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.model_executor.models.bailing_moe import BailingMoeV2ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from l2pd_adapters.families import family_of
from l2pd_adapters.vllm.model_state import BidirectionalState, BlockCausalState, DiffusionState


class _BlockCausal:
    """A block attends to itself and to the blocks before it."""

    @staticmethod
    def get_model_state_cls() -> type[DiffusionState]:
        return BlockCausalState


class SDARForCausalLM(_BlockCausal, Qwen3ForCausalLM):
    """SDAR: block-causal, on Qwen3."""


class SDARMoeForCausalLM(_BlockCausal, Qwen3MoeForCausalLM):
    """SDAR with experts: block-causal, on Qwen3-MoE."""


class LLaDA2MoeModelLM(_BlockCausal, BailingMoeV2ForCausalLM):
    """LLaDA2: block-causal, on BailingMoeV2."""


class _Bidirectional:
    """Attends to prompt and canvas; returns the hidden states of the current block."""

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


class LLaDAModelLM(BidirectionalLlama):
    """LLaDA: bidirectional, on Llama; its weights are renamed."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        family = family_of(self.config)
        return super().load_weights((family.native_weight(name), w) for name, w in weights)


class DreamModel(_Bidirectional, Qwen2ForCausalLM):
    """Dream: bidirectional, on Qwen2; a position's logits are those of the one before."""
