"""vLLM's diffusion schedulers, for canvases of masks.

vLLM treats the positions that are being decoded as draft tokens: it schedules as many as the canvas
has, and those that a step does not emit are rejected.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from l2pd_adapters.vllm.counting import CountingScheduler


def _cap(request: Request, max_model_len: int) -> None:
    """Reduce max_tokens so that the request's own limit ends it before the model's does."""
    request.max_tokens = min(request.max_tokens, max_model_len - request.num_prompt_tokens)


class _Blocks:
    """For block-causal models: schedules whole blocks, including the last one.

    The first block is read together with the end of the prompt, so the scheduler's count is ahead
    of the worker's by up to a block until that block is emitted. Its limit is increased by the same
    amount, so that it never cuts a block.
    """

    num_spec_tokens: int
    max_model_len: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limit = self.max_model_len
        self.max_model_len += self.num_spec_tokens

    def add_request(self, request: Request) -> None:
        _cap(request, self._limit)
        super().add_request(request)  # type: ignore[misc]


class BlockScheduler(CountingScheduler, _Blocks, DiffusionScheduler):
    """Reads the result of a step before it schedules the next."""


class BlockAsyncScheduler(CountingScheduler, _Blocks, DiffusionAsyncScheduler):
    """Schedules a step while the previous one runs."""


def block_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> DiffusionScheduler:
    """The scheduler of the two that vLLM's complete configuration selects."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    cls = BlockAsyncScheduler if asynchronous else BlockScheduler
    return cls(vllm_config=vllm_config, **kwargs)


class WholeSequenceScheduler(CountingScheduler, DiffusionScheduler):
    """For bidirectional models: every step computes the whole sequence, prompt and canvas."""

    def add_request(self, request: Request) -> None:
        _cap(request, self.max_model_len)
        super().add_request(request)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Schedule the part of the canvas that is not emitted yet; the worker knows its tokens."""
        for request_id in draft_token_ids.req_ids:
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished():
                end = request.num_prompt_tokens + request.max_tokens
                request.spec_token_ids = [-1] * (end - request.num_tokens)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As in vLLM, but with logits for at most one block of each request."""
        output = super().schedule(throttle_prefills)
        drafts = output.scheduled_spec_decode_tokens
        for request_id, tokens in drafts.items():
            drafts[request_id] = tokens[: self.num_spec_tokens]
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """As in vLLM, but all keys and values are computed again, since a commit makes them
        invalid.
        """
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(request_id)
            if request is not None:
                request.num_computed_tokens = 0
        return outputs
