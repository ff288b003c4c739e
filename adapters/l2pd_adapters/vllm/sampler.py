"""The sampler: a denoising step of the core, and its result in the form that vLLM expects.

vLLM's runner needs the tokens that a step emits, and by how much to reduce each request's count of
computed tokens. Both follow from tensors on the device and from what the host knew before the step;
nothing is read back.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch

from l2pd_adapters.metrics import decided
from l2pd_adapters.serving import PolicyServer
from l2pd_adapters.vllm.counting import COLUMNS, CountedOutput, counts_of
from l2pd_adapters.vllm.log_probabilities import Told
from l2pd_adapters.vllm.slot_canvases import Canvases
from l2pd_plugins.denoising import StepOutcome, denoising_step
from l2pd_plugins.slots import SlotBatch
from l2pd_plugins.upload import upload


class UnmaskSampler:
    """Replaces vLLM's Sampler, for the requests of one rank.

    Each rank decides independently: policies that depend only on their input make the same
    decisions on all ranks.
    """

    penalties_state = SimpleNamespace(output_bin_counts=None)
    """The runner reads this attribute; there are no penalties."""

    def __init__(self, canvases: Canvases, settings: PolicyServer, req_states: Any) -> None:
        self.canvases, self.settings = canvases, settings
        self.req_states = req_states

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Does nothing: the model state already has the request, with its prompt."""

    def apply_staged_writes(self) -> None:
        """Does nothing: nothing is staged."""

    def __call__(
        self, logits: Tensor, input_batch: InputBatch, draft_logits: Tensor | None = None
    ) -> CountedOutput:
        """One step for every request with logits, (N, V). For the other requests this pass has only
        read the prompt.

        A request has the logits of its block's first positions: all of them, unless its canvas ends
        earlier.
        """
        canvases, count = self.canvases, input_batch.num_reqs
        offered = np.diff(input_batch.cu_num_logits_np[: count + 1])
        queries = np.diff(input_batch.query_start_loc_np[: count + 1])
        if input_batch.num_draft_tokens == 0:  # for example vLLM's trial run for the memory profile
            offered = np.zeros_like(offered)
        taken_back = canvases.taken_back_after_prompt(input_batch.prefill_len_np[:count], queries)
        rejected = upload(taken_back, logits.device, torch.int32)
        sampled = rejected.new_zeros(count, canvases.block_length)
        logprobs = None
        settled = rejected.new_zeros(count)
        who = rejected.new_zeros(count, COLUMNS)
        rows = np.flatnonzero(offered)
        if len(rows):
            slots = input_batch.idx_mapping_np[rows]
            batch = canvases.take(slots)
            at = upload(rows, logits.device)
            computed = input_batch.positions[input_batch.query_start_loc[at]], queries[rows]
            tokens, counts, back, told, probable = self._step(
                slots, batch, logits, offered[rows], computed
            )
            logprobs = None if probable is None else _as_logprobs(probable, at, count)
            sampled.index_copy_(0, at, tokens.to(torch.int32))
            settled.index_copy_(0, at, counts.to(torch.int32))
            rejected.index_copy_(0, at, back.to(torch.int32))
            who.index_copy_(0, at, told)
        every = input_batch.idx_mapping[:count]
        blocks = canvases.blocks.tokens.index_select(0, every)
        # The input of the next pass of a block-causal model.
        self.req_states.draft_tokens[:, : canvases.block_length].index_copy_(0, every, blocks)
        return CountedOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=settled,
            num_rejected=rejected,
            l2pd=who,
        )

    def _step(
        self,
        slots: np.ndarray,
        batch: SlotBatch,
        logits: Tensor,
        offered: np.ndarray,
        computed: tuple[Tensor, np.ndarray],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Told | None]:
        """For each row: the emitted tokens, at the front of (B, L); their number, (B,); by how much
        vLLM's count of its computed positions must be reduced, (B,); its counts (`counts_of`); and
        the log-probabilities of the tokens, if a request wants them. computed: of each row, the
        first position of the pass, (B,), and the number of positions, (B,).
        """
        block, canvases = batch.block, self.canvases
        was_full = ~block.masked.any(-1)
        outcome = self._denoise(batch, logits, offered)
        who = decided(block, outcome)
        is_full = ~block.masked.any(-1)
        ready = canvases.ready(batch, was_full, is_full, outcome.ended)
        tokens, counts = canvases.settled(batch)
        suppress = block.mask_token_id if self.settings.suppress_mask else None
        canvases.log_probabilities.record(slots, batch, outcome, logits, offered, suppress)
        columns = canvases.columns_after_prompt(batch)
        probable = canvases.log_probabilities.told(slots, batch, columns, tokens)
        counts = torch.where(ready, counts, 0)
        canvases.count(batch, ~was_full, counts)
        first, queries = computed
        back = canvases.taken_back(batch, ready, first, upload(queries, logits.device))
        canvases.file(batch, ready, outcome.ended)
        told = counts_of(~was_full, who, canvases.seen(batch))
        return tokens, counts, back, told, probable

    def _denoise(self, batch: SlotBatch, logits: Tensor, offered: np.ndarray) -> StepOutcome:
        length, positions, places = self.canvases.block_length, None, None
        if (offered != length).any():
            places = np.flatnonzero(np.arange(length) < offered[:, None])
            positions = upload(places, logits.device)
        return denoising_step(
            batch.block,
            logits,
            positions,
            end_of_text=self.settings.end_of_text,
            suppress_mask=self.settings.suppress_mask,
            places=places,
        )


def _as_logprobs(told: Told, at: Tensor, count: int) -> LogprobsTensors:
    """In vLLM's form, for `count` requests, of which those with an entry in `told` are at `at`."""

    def laid_out(values: Tensor) -> Tensor:
        whole = values.new_zeros(count, *values.shape[1:]).index_copy(0, at, values)
        return whole.flatten(0, 1)

    length = told.ranks.shape[1]
    return LogprobsTensors(
        logprob_token_ids=laid_out(told.tokens),
        logprobs=laid_out(told.log_probabilities),
        selected_token_ranks=laid_out(told.ranks),
        cu_num_generated_tokens=[request * length for request in range(count + 1)],
    )
