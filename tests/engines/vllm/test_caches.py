"""The caches of bidirectional models, against the transformers adapter with the same cache.

Stale keys and values are what `prefix` and `dual` mean, so the models here are random ones, whose
answers they change; only the servers also run `tiny-llada`.
"""

import json
import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from vllm import LLM, SamplingParams

from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import folder_of
from l2pd_adapters.vllm.model_state import DiffusionState
from tests.engines.cases import decoded, random_requests
from tests.engines.checkpoints import random_bidirectional
from tests.engines.vllm.server import Server
from tests.engines.vllm.test_families import dream
from tests.engines.vllm.test_server import (
    MAX_NEW_TOKENS,
    ask,
    check,
    check_nothing_leaks,
)

LENGTH, LONGEST, PAGE = 32, 1600, 32
ENDS = (96, *range(4, 95, 9))
"""So many tokens end a text that many texts end within their first block."""
POLICIES = (
    {"name": "confidence_threshold", "threshold": 0.5},
    {"name": "fixed_schedule", "tokens_per_step": 2},
    {"name": "fixed_schedule", "tokens_per_step": 7},
    {"name": "persistent"},
)
CACHES = ("none", "prefix", "dual")


class Engine:
    """vLLM in this process, with pages for two long sequences, and transformers, on a random
    bidirectional model."""

    def __init__(self, folder):
        self.states = []
        add = DiffusionState.add_request
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                DiffusionState,
                "add_request",
                lambda state, *rest: (self.states.append(state), add(state, *rest))[1],
            )
            self.llm = LLM(
                str(random_bidirectional(folder, LENGTH, ends=ENDS)),
                dtype="float32",
                max_model_len=LONGEST,
                max_num_seqs=16,
                max_num_batched_tokens=LONGEST,
                enforce_eager=True,
                block_size=PAGE,
                num_gpu_blocks_override=74,
                additional_config={"decoding_plugin": {"name": "klass", "cache": "dual"}},
            )
            self(([5, 6, 7], POLICIES[0], "dual", 2))
        self.state = self.states[0]
        self.model, _ = load(folder, dtype=torch.float32)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler

    @staticmethod
    def params(policy, cache, max_tokens, **more):
        options = {f"decoding_plugin.{k}": v for k, v in policy.items() if k != "name"}
        asked = {"decoding_plugin": policy["name"], **options}
        if cache != "dual":  # the server's own
            asked["decoding_plugin.cache"] = cache
        return SamplingParams(max_tokens=max_tokens, temperature=0, extra_args=asked, **more)

    def __call__(self, *requests, **more):
        """The tokens of requests (prompt, policy, cache, max_tokens), decoded together."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, *_ in requests],
            [self.params(*asked, **more) for _, *asked in requests],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def transformers(self, prompt, policy, cache, max_tokens, *, ignore_eos=False):
        out = self.model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            unmask_policy=policy,
            cache=cache,
            end_of_text="off" if ignore_eos else "block",
            return_dict_in_generate=True,
        )
        length = max_tokens if ignore_eos else int(out.trace.length[0])
        return out.sequences[0, len(prompt) :][:length].tolist()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return Engine(tmp_path_factory.mktemp("random"))


class Watched:
    """What the scheduler does: the positions of each request's passes, and its pages after each."""

    def __init__(self, scheduler, monkeypatch):
        self.passes, self.pages, self.preempted, self.held_back = defaultdict(list), {}, [], 0
        self.given_back = set()
        schedule, preempt = scheduler.schedule, scheduler._preempt_request

        def scheduled(*args, **kwargs):
            output = schedule(*args, **kwargs)
            self.held_back += len(output.num_scheduled_tokens) < len(scheduler.running)
            for request_id, count in output.num_scheduled_tokens.items():
                self.passes[request_id].append(count)
            for request in scheduler.running:
                (ids,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
                if len(ids) < self.pages.get(request.request_id, 0):
                    self.given_back.add(request.request_id)
                self.pages[request.request_id] = len(ids)
            return output

        def preempting(request, *args, **kwargs):
            self.preempted.append(request)
            self.pages.pop(request.request_id, None)
            preempt(request, *args, **kwargs)

        monkeypatch.setattr(scheduler, "schedule", scheduled)
        monkeypatch.setattr(scheduler, "_preempt_request", preempting)

    def in_order(self):
        """The positions of each request's passes, in the order in which the requests came."""
        by_number = sorted(self.passes.items(), key=lambda item: int(item[0].split("-")[0]))
        return [passes for _, passes in by_number]


def prompts(count, shortest=1, longest=60, seed=0):
    rng = random.Random(seed)
    return [
        [rng.randrange(95) for _ in range(rng.randint(shortest, longest))] for _ in range(count)
    ]


def test_tokens_are_those_of_the_same_cache_in_transformers(engine, monkeypatch):
    """Every cache and policy in one batch, beside requests that are preempted, and with pages that
    are given back behind the end of a text."""
    watched = Watched(engine.scheduler, monkeypatch)
    asked = [
        (prompt, POLICIES[i % 4], cache, 110)
        for i, prompt in enumerate(prompts(6, shortest=50))
        for cache in CACHES
    ]
    found = engine(*asked)
    for request, tokens in zip(asked, found, strict=True):
        assert tokens == engine.transformers(*request), request
    assert watched.preempted
    assert watched.given_back
    assert engine.scheduler.kv_cache_manager.usage == 0
    none, prefix, dual = (found[at::3] for at in range(3))
    assert none != prefix != dual != none  # else equality would prove nothing


def test_positions_that_are_computed(engine, monkeypatch):
    """With 4 tokens per step, a block has 8 passes. The two long requests without a cache do not
    fit into one step, so they take turns."""
    watched = Watched(engine.scheduler, monkeypatch)
    four = {"name": "fixed_schedule", "tokens_per_step": 4}
    (short,), (long,) = prompts(1, 64, 64), prompts(1, 1024, 1024)
    engine(*((short, four, cache, 512) for cache in CACHES), ignore_eos=True)
    engine((long, four, "dual", 512), ignore_eos=True)
    none, prefix, dual, longer = watched.in_order()
    assert sum(dual) <= sum(none) / 5
    assert sum(prefix) <= sum(none) * 2 / 3
    for passes, prompt in ((dual, short), (longer, long)):
        first, *rest = passes  # of the prompt alone
        assert first == len(prompt)
        assert rest == ([len(prompt) + 512] + 7 * [LENGTH]) * 16

    watched = Watched(engine.scheduler, monkeypatch)
    asked = [(long, four, "none", 64), (long, four, "none", 64), (long, four, "dual", 64)]
    found = engine(*asked, ignore_eos=True)
    assert watched.held_back
    for request, tokens in zip(asked, found, strict=True):
        assert tokens == engine.transformers(*request, ignore_eos=True)


def test_nothing_is_left_of_five_hundred_requests_of_which_a_hundred_are_cancelled(engine):
    rng = random.Random(3)
    fast = (
        {"name": "confidence_threshold", "threshold": 0.0},
        {"name": "fixed_schedule", "tokens_per_step": 16},
    )
    kinds = [(p, rng.choice(fast), rng.choice(CACHES), 40) for p in prompts(20, seed=1)]
    llm, asked = engine.llm.llm_engine, {}
    for i in range(500):
        asked[str(i)] = rng.choice(kinds)
        prompt, *rest = asked[str(i)]
        llm.add_request(str(i), {"prompt_token_ids": prompt}, engine.params(*rest))
    cancelled, finished, answers = set(), set(), defaultdict(set)
    while llm.has_unfinished_requests():
        for output in llm.step():
            if output.finished and output.request_id not in cancelled:
                finished.add(output.request_id)
                kind = kinds.index(asked[output.request_id])
                answers[kind].add(tuple(output.outputs[0].token_ids))
        for request in list(engine.scheduler.running):  # after any number of their passes
            if len(cancelled) < 100 and rng.random() < 0.1:
                request_id = request.request_id.split("-")[0]
                cancelled.add(request_id)
                llm.abort_request([request_id])
    assert (len(finished), len(cancelled)) == (400, 100)
    assert all(len(found) == 1 for found in answers.values())
    assert engine.scheduler.kv_cache_manager.usage == 0
    engine(([5, 6, 7], POLICIES[0], "dual", 2))
    assert len(engine.state._slots) <= 1


SERVED = (
    {"name": "confidence_threshold", "threshold": 0.3},
    {"name": "fixed_schedule", "tokens_per_step": 3},
    {"name": "fixed_schedule", "tokens_per_step": 8},
    {"name": "persistent"},
)
FLAGS = {
    "decoding_plugin_config": '{"cache": "dual"}',
    "block_size": PAGE,
    "num_gpu_blocks_override": 64,  # for ten of the sixteen requests
}


@pytest.fixture(scope="module", params=["tiny-llada", "dream"])
def model(request, tmp_path_factory):
    if request.param == "tiny-llada":
        return folder_of(request.param)
    folder = tmp_path_factory.mktemp("dream")
    dream(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return folder


def with_caches(model):
    """A hundred cases, half of them with each cache."""
    requests = random_requests(SERVED, 100, seed=5)
    made = []
    for cache, some in (("prefix", requests[::2]), ("dual", requests[1::2])):
        for case in decoded(str(model), some, MAX_NEW_TOKENS, cache=cache):
            made.append(replace(case, policy={**case.policy, "cache": cache}))
    return made


def test_a_server(model, tmp_path):
    """With a hundred prompts, sixteen at a time, streamed or not, with too few pages for all, and
    twenty more that are cancelled."""
    cases = with_caches(model)
    with Server(tmp_path, model=model, **FLAGS) as running:
        requests = []
        for i, case in enumerate(cases):
            way = {"chat": i % 2 == 0, "stream": i % 4 < 2}
            requests.append(lambda client, case=case, way=way: client.ask(case, **way))
            if i % 5 == 0:
                requests.append(lambda client, case=case, i=i: client.cancel(case, i % 3))
        answers = [answer for answer in ask(running, *requests) if answer is not None]
        for case, answer in zip(cases, answers, strict=True):
            check(case, answer)
        assert running.metric("vllm:num_preemptions_total") > 0
        check_nothing_leaks(running, cases[0])
        assert running.metric("vllm:kv_cache_usage_perc") == 0
        assert "cache=dual: up to 16 sequences" in running.log
