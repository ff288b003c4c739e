"""The model state for vLLM's runner: requests, inputs and attention of a diffusion language
model.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.states import RequestState

from l2pd_adapters.request_sampling import ASKED, FIELDS, sampling_of
from l2pd_adapters.serving import generator_of, guarded
from l2pd_adapters.vllm import counting
from l2pd_adapters.vllm.queries import split_into_blocks, write_hidden_rows
from l2pd_adapters.vllm.sampler import UnmaskSampler
from l2pd_adapters.vllm.settings import VllmServer, settings_of
from l2pd_adapters.vllm.slot_canvases import BidirectionalCanvases, BlockCausalCanvases, Canvases
from l2pd_plugins import UnmaskPolicy
from l2pd_plugins.policy_attributes import description_of
from l2pd_plugins.upload import upload

logger = init_logger(f"vllm.{__name__}")  # as vLLM's own are set up


class DiffusionState(ModelState):
    """The requests of a masked diffusion language model, in vLLM's slots."""

    num_new_sampled_tokens_per_step = 0
    canvases_class: ClassVar[type[Canvases]]

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        settings = settings_of(self.model_config)
        assert settings is not None
        self.settings: VllmServer = settings
        context = settings.model
        self.canvases = self.canvases_class(
            self.max_num_reqs,
            context.block_length,
            self.max_model_len,
            context.mask_token_id,
            device,
            **self.settings_of_canvases,
        )
        self._sampling_defaults = self.model_config.get_diff_sampling_param()
        self._slots: dict[str, int] = {}

    @property
    def settings_of_canvases(self) -> dict[str, Any]:
        """More arguments of `canvases_class`."""
        return {}

    def settings_of_request(self, params: Any) -> dict[str, Any]:
        """More arguments of the canvases' `assign`."""
        return {}

    def get_supported_generation_tasks(self) -> tuple[Any, ...]:
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        counting.install()
        return UnmaskSampler(self.canvases, self.settings, sampler.req_states), None

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        params, text = new_req_data.sampling_params, new_req_data.prefill_token_ids
        assert params is not None and text is not None
        self._slots[new_req_data.req_id] = req_index
        seed = new_req_data.req_id if params.seed is None else params.seed
        ignores_end = self.settings.ignores_end(params)
        sampling = sampling_of(
            {name: getattr(params, name) for name in FIELDS},
            seed=params.seed,
            request_id=new_req_data.req_id,
            vocabulary=self.settings.model.vocab_size,
            asked=bool((params.extra_args or {}).get(ASKED)),
            defaults=self._sampling_defaults,
        )

        def begin(policy: UnmaskPolicy) -> None:
            self.canvases.assign(
                req_index,
                policy,
                text,
                new_req_data.prompt_len,
                params.max_tokens or self.max_model_len,
                ignores_end=ignores_end,
                generator=generator_of(f"{seed}:{len(text)}", self.device),
                sampling=sampling,
                top=-1 if params.logprobs is None else params.logprobs,
                **self.settings_of_request(params),
            )

        guarded(
            lambda: begin(self.settings.admitted(params)),
            lambda: begin(self.settings.policy(None, {})),
        )

    def remove_request(self, req_id: str) -> None:
        slot = self._slots.pop(req_id, None)
        if slot is None:
            return
        if logger.isEnabledFor(logging.DEBUG):  # reads the device
            nfe, tokens = int(self.canvases.nfe[slot]), int(self.canvases.given_out[slot])
            policy = description_of(self.canvases.blocks.policy_of(slot))
            per_forward = tokens / nfe if nfe else 0.0
            logger.debug(
                "request %s: policy=%s nfe=%d tokens=%d tokens_per_forward=%.2f",
                *(req_id, policy, nfe, tokens, per_forward),
            )
        self.canvases.release(slot)

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        req_states: RequestState,
    ) -> None:
        return None

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        return {}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        padded = cudagraph_mode == CUDAGraphMode.FULL
        queries = self.queries(input_batch, padded, block_tables)
        longest = int(np.diff(queries["query_start_loc_cpu"]).max())
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_tokens=input_batch.num_tokens_after_padding if padded else input_batch.num_tokens,
            max_query_len=longest,
            max_seq_len=self.max_model_len if for_capture else self.longest(input_batch),
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            causal=False,
            for_cudagraph_capture=for_capture,
            ubatch_idx=ubatch_idx,
            **queries,
        )

    def longest(self, input_batch: InputBatch) -> int:
        """The greatest number of keys of a query, or more."""
        return int(input_batch.seq_lens_cpu_upper_bound.max())

    def queries(
        self, input_batch: InputBatch, padded: bool, block_tables: tuple[Tensor, ...]
    ) -> dict[str, Any]:
        """The queries for the attention, each of which attends to all of its keys: num_reqs,
        query_start_loc_gpu, query_start_loc_cpu, seq_lens and block_tables.
        """
        count = input_batch.num_reqs_after_padding if padded else input_batch.num_reqs
        return {
            "num_reqs": count,
            "query_start_loc_gpu": input_batch.query_start_loc[: count + 1],
            "query_start_loc_cpu": torch.from_numpy(input_batch.query_start_loc_np[: count + 1]),
            "seq_lens": input_batch.seq_lens[:count],
            "block_tables": block_tables,
        }


class BlockCausalState(DiffusionState):
    """A block attends to itself and to the blocks before it."""

    canvases_class = BlockCausalCanvases

    def queries(
        self, input_batch: InputBatch, padded: bool, block_tables: tuple[Tensor, ...]
    ) -> dict[str, Any]:
        """Each block of a prompt becomes a separate query. A request that is being decoded has only
        its current block, which already is one query.
        """
        found = super().queries(input_batch, padded, block_tables)
        length = self.canvases.block_length
        ends = input_batch.query_start_loc_np[: found["num_reqs"] + 1]
        if (np.diff(ends) <= length).all():
            return found
        owner, begin_and_end, behind = split_into_blocks(ends, length)
        of_request, cut = upload(np.stack([owner, behind]), self.device).unbind()
        seq_lens = found["seq_lens"].index_select(0, of_request) - cut.to(torch.int32)
        return {
            "num_reqs": len(owner),
            "query_start_loc_gpu": upload(begin_and_end, self.device, torch.int32),
            "query_start_loc_cpu": torch.from_numpy(begin_and_end),
            "seq_lens": seq_lens,
            "block_tables": tuple(table.index_select(0, of_request) for table in block_tables),
        }


class BidirectionalState(DiffusionState):
    """Every position attends to every other. A pass computes prompt and canvas or, with a cache, a
    part of them (`passes`). What a CUDA graph reads is in buffers with fixed addresses.
    """

    canvases: BidirectionalCanvases
    canvases_class = BidirectionalCanvases

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._hidden_rows = torch.arange(tokens, device=device)
        self._seq_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)

    @property
    def settings_of_canvases(self) -> dict[str, Any]:
        return {"logit_shift": self.settings.logit_shift}

    def settings_of_request(self, params: Any) -> dict[str, Any]:
        return {"cached": self.settings.cache_of(params) != "none"}

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """The tokens, and for each row of logits the row of hidden states to use.

        vLLM computes the logits of a request's last rows, but those of its block are needed.
        """
        count, size = input_batch.num_reqs, input_batch.num_tokens
        slots, starts = input_batch.idx_mapping, input_batch.query_start_loc[: count + 1]
        owner = torch.repeat_interleave(slots, starts.diff(), output_size=size)
        ids = input_batch.input_ids
        ids[:size] = self.canvases.text[owner, input_batch.positions[:size]].to(ids.dtype)

        rows = self._hidden_rows[: len(ids)]
        write_hidden_rows(
            rows,
            starts,
            input_batch.positions,
            offered=input_batch.cu_num_logits[: count + 1].diff(),
            logits_indices=input_batch.logits_indices,
            blocks=self.canvases.start.index_select(0, input_batch.expanded_idx_mapping),
            columns=input_batch.expanded_local_pos - self.settings.logit_shift,
        )
        return {"input_ids": ids, "hidden_rows": rows}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """The inputs to capture a CUDA graph with."""
        return {"hidden_rows": self._hidden_rows[:num_tokens]}

    def longest(self, input_batch: InputBatch) -> int:
        """A partial pass attends to more than it computes: to all positions that there may be."""
        return self.max_model_len

    def queries(
        self, input_batch: InputBatch, padded: bool, block_tables: tuple[Tensor, ...]
    ) -> dict[str, Any]:
        """A query of a step attends to the whole text, also to what this pass does not compute.
        Positions after the end of the text are not attended to.
        """
        found = super().queries(input_batch, padded, block_tables)
        count, seq_lens = input_batch.num_reqs, self._seq_lens[: found["num_reqs"]]
        seq_lens.copy_(found["seq_lens"])
        if input_batch.num_draft_tokens:
            stepped = input_batch.cu_num_logits[: count + 1].diff() > 0
            visible = self.canvases.visible.index_select(0, input_batch.idx_mapping)
            seq_lens[:count] = torch.where(stepped, visible.to(seq_lens.dtype), seq_lens[:count])
        found["seq_lens"] = seq_lens
        return found
