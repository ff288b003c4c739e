"""vLLM's diffusion schedulers, for canvases of masks.

vLLM treats the positions that are being decoded as draft tokens: it schedules as many as the canvas
has, and those that a step does not emit are rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from l2pd_adapters.families import CacheKind
from l2pd_adapters.vllm.counting import SEEN, CountingScheduler
from l2pd_adapters.vllm.settings import CARRIED

_PLACE = "_l2pd_place"
"""The attribute of vLLM's requests that has their `_Place`."""


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


@dataclass
class _Place:
    """Where a request of a bidirectional model stands, in the scheduler."""

    cache: CacheKind
    end: int
    """One past the last position of its canvas."""
    seen: int
    """One past the last position that it attends to: `end`, or the end of its text."""
    partial: bool = False
    """Whether its next pass is a partial one."""
    computed_at: int = 0
    """The last scheduler step that computed it."""


class BidirectionalScheduler(CountingScheduler, DiffusionScheduler):
    """For bidirectional models: a step computes the whole sequence, prompt and canvas, or, with a
    cache, what `passes` says.

    The next pass begins at `num_computed_tokens`, and `spec_token_ids` has what it computes behind
    the emitted tokens: whether that is a full or a partial pass is known once the result of the
    step before is read, since a policy decides how many steps a block takes. So there is no
    asynchronous scheduling.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._passes = self._settings.passes

    def add_request(self, request: Request) -> None:
        _cap(request, self.max_model_len)
        end = request.num_prompt_tokens + request.max_tokens
        place = _Place(self._settings.cache_of(request.sampling_params), end, seen=end)
        setattr(request, _PLACE, place)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """As in vLLM, but no pass is cut, and only the block of each request has logits."""
        self._hold_back()
        output = super().schedule(throttle_prefills)
        drafts = output.scheduled_spec_decode_tokens
        for request_id, tokens in drafts.items():
            drafts[request_id] = tokens[: self._passes.block_length]
        for request_id in output.num_scheduled_tokens:
            _place_of(self.requests[request_id]).computed_at = self.current_step
        return output

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Schedule the next pass; the worker knows the tokens."""
        for request_id in draft_token_ids.req_ids:
            request = self.requests.get(request_id)
            if request is not None and not request.is_finished():
                end = self._end_of_pass(request)
                request.spec_token_ids = [-1] * (end - request.num_tokens)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        """As in vLLM, but the next pass of a request begins at its block, if that has had its first
        step and is not finished, else at 0: a commit makes all keys and values invalid.
        """
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        stepped = scheduler_output.scheduled_spec_decode_tokens
        emitted = model_runner_output.sampled_token_ids
        rows = getattr(model_runner_output, CARRIED, None) or []
        for at, request_id in enumerate(model_runner_output.req_ids):
            request = self.requests.get(request_id)
            if request is None:
                continue
            place = _place_of(request)
            in_block = request_id in stepped and not emitted[at]
            place.partial = in_block and place.cache != "none"
            if place.partial:
                request.num_computed_tokens = self._passes.begin(request.num_tokens)
                self._see(request, rows[at][SEEN] if rows else place.end)
            else:
                request.num_computed_tokens = 0
                place.seen = place.end
        return outputs

    def _end_of_pass(self, request: Request) -> int:
        """One past the last position of the request's next pass."""
        place = _place_of(request)
        if not place.partial:
            return place.end
        end = self._passes.end(place.cache, request.num_tokens, last=place.seen)
        return min(end, self.max_model_len)

    def _see(self, request: Request, seen: int) -> None:
        """Note the end of the request's text, one past the last position that it attends to, and
        give back the pages that its block, the last one, no longer needs.
        """
        place = _place_of(request)
        if seen < place.seen:
            place.seen = seen
            give_back_pages(self, request.request_id, self._end_of_pass(request))

    def _hold_back(self) -> None:
        """Let a request wait for a later step if its pass does not fit into this one, where vLLM
        would cut it. Those that have waited longest come first, so each has its turn.
        """
        left = self.max_num_scheduled_tokens
        waited = sorted(self.running, key=lambda request: _place_of(request).computed_at)
        for request in waited:
            positions = request.num_tokens_with_spec - request.num_computed_tokens
            if positions <= left:
                left -= positions
            else:  # vLLM counts this step before it compares
                request.next_decode_eligible_step = self.current_step + 2


def _place_of(request: Request) -> _Place:
    place: _Place = getattr(request, _PLACE)
    return place


def give_back_pages(scheduler: DiffusionScheduler, request_id: str, end: int) -> None:
    """Free the pages of a request that hold only positions from `end` on. It must not need them
    again before it ends or is preempted, since the worker's table of pages keeps them until then.
    """
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        pages = manager.req_to_blocks[request_id]
        kept = -(-end // manager.block_size)
        behind = pages[kept:]
        del pages[kept:]
        manager.block_pool.free_blocks(reversed(behind))
