"""Requests that sample, on SGLang's own run loops."""

import gc
import random
from array import array

import pytest

from l2pd_adapters.request_sampling import ASKED
from l2pd_adapters.sglang.algorithm import UnmaskPolicyAlgorithm
from tests.engines.sglang.loops import BLOCK, Loop, make_config, make_request
from tests.engines.sglang.test_run_loops import MODES, random_prompts

POLICIES = (
    {"unmask_policy": "confidence_threshold", "threshold": 0.5},
    {"unmask_policy": "fixed_schedule", "tokens_per_step": 2},
    {"unmask_policy": "saber"},
)
HOW = (
    {},
    {"temperature": 1.3},
    {"top_p": 0.7},
    {"temperature": 0.8, "top_k": 5, "min_p": 0.05},
)


def requests_for(config, name):
    """Twelve requests, of which a quarter is greedy; their ids do not matter, since each has a
    seed."""
    prompts = random_prompts(random.Random(3), 12)
    made = []
    for at, prompt in enumerate(prompts):
        how = HOW[at % 4]
        custom = {**POLICIES[at % 3], **({ASKED: True} if how else {})}
        request = make_request(f"{name} {at}", prompt, config, custom_params=custom, **how)
        if how:
            request.sampling_params.sampling_seed = at
            request.l2pd = type(request.l2pd).of(request, config.l2pd)
        made.append(request)
    return made


@MODES
def test_a_request_draws_the_same_alone_and_in_a_batch(fdfo):
    config = make_config("confidence_threshold", fdfo=fdfo)
    together = [*Loop(config).run(*requests_for(config, "all")).values()]
    alone = [
        tokens
        for request in requests_for(config, "one")
        for tokens in Loop(config).run(request).values()
    ]
    assert together == alone
    greedy = [
        [*Loop(config).run(make_request(f"greedy {at}", [1, 2], config)).values()]
        for at in range(2)
    ]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("rounds", [4, 6, 9])
def test_a_block_that_begins_again_draws_the_same_tokens(rounds):
    """As after a retraction, which keeps the tokens of finished blocks."""
    config = make_config("confidence_threshold")
    whole = [*Loop(config).run(*requests_for(config, "whole")).values()]
    loop, requests = Loop(config), requests_for(config, "again")
    loop.add(*requests)
    for _ in range(rounds):
        loop.round()
    begun = [request for request in loop.live if request.dllm_incomplete_ids]
    assert begun
    for request in begun:
        request.dllm_incomplete_ids, request.dllm_algo_state = array("q"), None
        request.dllm_block_offset -= BLOCK
        request.init_next_round_input()
    while loop.live:
        loop.round()
    assert [list(request.output_ids_through_stop) for request in requests] == whole


def test_nothing_is_left_of_a_cancelled_request():
    config = make_config("confidence_threshold")
    loop, requests = Loop(config), requests_for(config, "cancelled")
    loop.add(*requests)
    for _ in range(3):
        loop.round()
    names = {request.rid for request in requests}
    del requests, loop
    gc.collect()
    assert not names & {*UnmaskPolicyAlgorithm.requests}
