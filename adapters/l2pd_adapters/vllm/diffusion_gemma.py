"""DiffusionGemma with a policy instead of its entropy bound.

At each step vLLM's own sampler draws a token for every position of a canvas, accepts those within
its bound, and replaces all others by noise. A canvas ends when its most likely tokens are stable,
and these are emitted. Here vLLM's step runs with a bound that accepts nothing; then the drawn
tokens that the policy selects replace the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models import diffusion_gemma as stock
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from l2pd_adapters.families import NO_MASK_TOKEN
from l2pd_adapters.serving import generator_of, guarded
from l2pd_adapters.vllm.settings import DiffusionGemmaServer, settings_of
from l2pd_plugins import UnmaskPolicy
from l2pd_plugins.block_layout import BlockLayout
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.slots import BlockSlots, SlotBatch
from l2pd_plugins.upload import upload


class DiffusionGemmaWithPolicy(stock.DiffusionGemmaForConditionalGeneration):
    """vLLM's DiffusionGemma, with a policy for each request."""

    @staticmethod
    def get_model_state_cls() -> type[PolicyState]:
        return PolicyState


class PolicyState(stock.DiffusionGemmaModelState):
    """vLLM's state of its requests, and the state of their policies."""

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        settings = settings_of(self.model_config)
        assert isinstance(settings, DiffusionGemmaServer)
        self.settings = settings
        self.blocks = BlockSlots(
            self.max_num_reqs,
            settings.model.block_length,
            mask_token_id=NO_MASK_TOKEN,
            device=device,
        )

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        made, rejection = super().custom_sampler(sampler)
        return PolicySampler(made, self.blocks, self.settings), rejection

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        params, text = new_req_data.sampling_params, new_req_data.prefill_token_ids
        assert params is not None and text is not None
        length, prompt = self.blocks.block_length, new_req_data.prompt_len
        answer = min(params.max_tokens or self.max_model_len, self.max_model_len - prompt)
        layout = BlockLayout.of("bidirectional", prompt, answer, length)

        def begin(policy: UnmaskPolicy) -> None:
            self.blocks.assign(
                req_index,
                policy,
                [NO_MASK_TOKEN] * length,
                [True] * length,
                block_index=layout.block_at(len(text)),
                canvas_length=layout.whole_end - layout.origin,
                # vLLM refuses requests with a seed.
                generator=generator_of(f"{new_req_data.req_id}:{len(text)}", self.device),
            )

        guarded(
            lambda: begin(self.settings.admitted(params)),
            lambda: begin(self.settings.policy(None, {})),
        )

    def remove_request(self, req_id: str) -> None:
        slot = self._req_id_to_index.get(req_id)
        super().remove_request(req_id)
        if slot is not None:
            self.blocks.release(slot)


class PolicySampler:
    """vLLM's sampler, in which the policies decide which tokens are accepted."""

    def __init__(
        self, sampler: stock.DiffusionSampler, blocks: BlockSlots, settings: DiffusionGemmaServer
    ) -> None:
        sampler.entropy_bound = -math.inf  # accepts nothing
        self.sampler, self.blocks, self.settings = sampler, blocks, settings
        self.states = sampler.diffusion_states
        self.drawn = torch.zeros_like(self.states.canvas)
        """(S, L), the tokens that the last step drew."""

    def __getattr__(self, name: str) -> Any:
        """All other attributes that the runner uses of a sampler."""
        return getattr(self.sampler, name)

    def __call__(
        self, logits: Tensor, input_batch: InputBatch, draft_logits: Tensor | None = None
    ) -> SamplerOutput:
        """One step for every request with logits, (N, V). For the other requests this pass has only
        read the prompt.

        A request has the logits of its canvas's first positions: all of them, unless the canvas is
        shortened by the model's length or by the request.
        """
        if input_batch.num_draft_tokens == 0:
            return self.sampler(logits, input_batch, draft_logits)
        offered = np.diff(input_batch.cu_num_logits_np[: input_batch.num_reqs + 1])
        rows = np.flatnonzero(offered)
        batch = self.blocks.take(input_batch.idx_mapping_np[rows])
        tempered = self._tempered(batch, logits, offered[rows])  # before vLLM increments its step
        with self._keeping_what_is_drawn():
            output = self.sampler(logits, input_batch, draft_logits)
        given_out = output.num_sampled.index_select(0, upload(rows, logits.device)) > 0
        self._accept(batch, tempered, offered[rows], given_out)
        return output

    def _tempered(self, batch: SlotBatch, logits: Tensor, offered: np.ndarray) -> Tensor:
        """(N, V) float32, the logits at the temperature of the step that each row is to take."""
        temperature = stock._denoise_temperature(
            self.states.step,
            batch.index,
            float(self.states.max_denoising_steps),
            self.sampler.t_min,
            self.sampler.t_max,
        ).clamp(min=1e-10)  # as in vLLM
        times = upload(offered, logits.device)
        of_logits = temperature.repeat_interleave(times, output_size=len(logits))
        return logits.float() / of_logits.unsqueeze(-1)

    @contextmanager
    def _keeping_what_is_drawn(self) -> Iterator[None]:
        """Context manager: stores the drawn tokens, which vLLM's sampler passes only to its
        step.
        """
        step = stock._compiled_sample_step

        def watched(
            new_tokens: Tensor,
            argmax_tokens: Tensor,
            token_entropy: Tensor,
            probs: Tensor | None,
            decode_slots: Tensor,
            *rest: Any,
            **settings: Any,
        ) -> None:
            self.drawn[:, : new_tokens.shape[1]].index_copy_(0, decode_slots, new_tokens)
            step(new_tokens, argmax_tokens, token_entropy, probs, decode_slots, *rest, **settings)

        stock._compiled_sample_step = watched
        try:
            yield
        finally:
            stock._compiled_sample_step = step

    def _accept(
        self, batch: SlotBatch, logits: Tensor, offered: np.ndarray, given_out: Tensor
    ) -> None:
        """Put the drawn tokens that the policies select into the canvases that continue.

        given_out: (B,) bool, the rows whose canvas was emitted and that begin the next one.
        """
        blocks, states = self.blocks, self.states
        block, at = batch.block, batch.index
        goes_on = ~(given_out | states.is_encoder_phase.index_select(0, at))
        inside = np.arange(blocks.block_length) < offered[:, None]
        to_decide = goes_on.unsqueeze(-1) & upload(inside, at.device)
        before = states.canvas.index_select(0, at)
        # Positions that are not open for selection keep their token, so it is a valid index into
        # the vocabulary.
        block.set_tokens(torch.where(to_decide, NO_MASK_TOKEN, before))
        positions = None if inside.all() else upload(np.flatnonzero(inside), at.device)
        drawn = self.drawn.index_select(0, at).flatten()
        outcome = denoising_step(
            block,
            logits,
            positions,
            end_of_text=self.settings.end_of_text,
            x0=drawn if positions is None else drawn.index_select(0, positions),
            suppress_mask=self.settings.suppress_mask,
        )
        accepted = outcome.committed & ~states.pin_mask.index_select(0, at)
        canvas = torch.where(accepted, outcome.step.x0, before)
        states.canvas.index_copy_(0, at, canvas)
        drafts = self.sampler.req_states.draft_tokens
        drafts[:, : blocks.block_length].index_copy_(0, at, canvas.to(drafts.dtype))
        block.set_tokens(torch.full_like(before, NO_MASK_TOKEN))  # all open at the next step
        batch.advance(given_out, block.tokens, block.present)
        blocks.put(batch)
