"""Choose the requests that run together, so that the KV cache has room for each until its end.

SGLang's own accounting fails for these requests. It reserves no memory for the answer of an
admitted request (`PrefillAdder._add_dllm_req`), charges running requests their whole
`max_new_tokens` again in each round (`add_dllm_staging_req`), and when its budget is used up it
cuts a block or ignores the limit (`_get_dllm_remain_tokens`); both end the server. Here a request
starts only if everything that it may need fits in addition to everything that the running requests
may need. The memory is then always sufficient, and SGLang's budget is not used. Other requests wait
in SGLang's queue, in its order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def fetch_waiting(original: Callable[[Any], None], scheduler: Any) -> None:
    """Start as many of the waiting requests as the KV cache has room for
    (`SchedulerDllmMixin._fetch_waiting_reqs`)."""
    manager = scheduler.dllm_manager
    if not hasattr(scheduler.dllm_config, "l2pd"):
        original(scheduler)
        return
    free = scheduler.max_total_num_tokens - sum(
        _most_tokens(scheduler, request) for request in manager.waiting_queue
    )
    places = scheduler.dllm_config.max_running_requests - len(manager.waiting_queue)
    starting = 0
    for request in scheduler.waiting_queue[: max(places, 0)]:
        free -= _most_tokens(scheduler, request)
        if free < 0:
            break
        starting += 1
    if starting:
        manager.add_waiting_reqs(scheduler.waiting_queue[:starting])
        scheduler.waiting_queue = scheduler.waiting_queue[starting:]


def remaining_tokens(original: Callable[..., int], adder: Any, request: Any = None) -> int:
    """The number of tokens of a request in this round: a whole block, or none
    (`PrefillAdder._get_dllm_remain_tokens`)."""
    config = adder.dllm_config
    if not hasattr(config, "l2pd") or config.requires_separate_context_encoding:
        return original(adder, request)
    return min(adder.rem_dllm_tokens, adder.dllm_block_size)


def validate(
    original: Callable[[Any, Any], str | None], scheduler: Any, request: Any
) -> str | None:
    """Why a request is refused, or None (`SchedulerDllmMixin.validate_dllm_request`).

    A request for more than the whole cache is refused here; SGLang would cut it silently.
    """
    problem = original(scheduler, request)
    if problem is not None or not hasattr(scheduler.dllm_config, "l2pd"):
        return problem
    prompt, block = len(request.origin_input_ids), scheduler.dllm_config.block_size
    asked = request.sampling_params.max_new_tokens
    room = scheduler.max_total_num_tokens // block * block
    if asked is None or _up_to(block, prompt + asked) <= room:
        return None
    return (
        f"max_new_tokens={asked}: with a prompt of {prompt} tokens, in whole blocks of {block}, it "
        f"does not fit into the server's KV cache; expected at most {max(room - prompt, 0)}"
    )


def _most_tokens(scheduler: Any, request: Any) -> int:
    """The most tokens of the KV cache that the request may need: its blocks and one more, in whole
    pages, but at most the whole cache, since a request may run alone."""
    tokens = len(request.origin_input_ids) + request.sampling_params.max_new_tokens
    block = scheduler.dllm_config.block_size
    needed = _up_to(scheduler.page_size, _up_to(block, tokens) + block)
    return min(needed, scheduler.max_total_num_tokens)


def _up_to(size: int, tokens: int) -> int:
    """The next multiple of the size."""
    return -(-tokens // size) * size
