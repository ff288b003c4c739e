"""A real server, launched with the documented command, against the transformers adapter."""

import asyncio
import json
import random
import re
import subprocess
import time
from dataclasses import replace

import httpx
import pytest
from openai import AsyncOpenAI

from l2pd_adapters.tiny_models import folder_of
from tests.engines.cases import decoded, learned_policies, random_requests, some_cancelled
from tests.engines.launching import ask_together, run_example
from tests.engines.vllm.server import DOCS, Server

PROMPTS, CONCURRENCY, MAX_NEW_TOKENS = 200, 16, 128
SMALL_CACHE = {"block_size": 32, "num_gpu_blocks_override": 24}
"""Pages for the longest request, but not for sixteen that all grow by a page with each block."""


def policies_of(model):
    return (
        {"name": "confidence_threshold", "threshold": 0.8},
        {"name": "fixed_schedule"},
        {"name": "fixed_schedule", "steps": 48},
        {"name": "persistent"},
        *learned_policies(model),
    )


@pytest.fixture(scope="module", params=["tiny-sdar", "tiny-llada"])
def model(request):
    return request.param


@pytest.fixture(scope="module")
def cases(model):
    return decoded(model, random_requests(policies_of(model), PROMPTS), MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """As in the documentation, with --enforce-eager."""
    with Server(tmp_path_factory.mktemp(model), model=folder_of(model)) as running:
        yield running


def xargs(case):
    options = {f"decoding_plugin.{name}": value for name, value in case.options.items()}
    return {"decoding_plugin": case.policy["name"], **options}


class Client:
    """Asks the server in each of the ways that the documentation shows."""

    def __init__(self, url):
        self.openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self.room = asyncio.Semaphore(CONCURRENCY)

    async def ask(self, case, *, chat=True, stream=False, **params):
        """(token ids, reason of the end) of an answer."""
        tokens, reason = [], None
        async with self.room:
            answer = await self._create(case, chat, stream, **params)
            if not stream:
                (choice,) = answer.choices
                return choice.token_ids, choice.finish_reason
            async for chunk in answer:
                for choice in chunk.choices:
                    tokens += getattr(choice, "token_ids", None) or []
                    reason = choice.finish_reason or reason
        return tokens, reason

    async def cancel(self, case, chunks):
        """Begin an answer that has no end, and hang up in the middle of it."""
        async with self.room:
            answer = await self._create(
                case, True, True, max_tokens=350, extra_body={"ignore_eos": True}
            )
            async for _ in answer:
                chunks -= 1
                if chunks <= 0:
                    await answer.close()
                    return

    def _create(self, case, chat, stream, *, extra_body=None, **params):
        settings = {
            "model": "tiny",
            "max_tokens": MAX_NEW_TOKENS,
            "stream": stream,
            "extra_body": {
                "vllm_xargs": xargs(case),
                "return_token_ids": True,
                **(extra_body or {}),
            },
            **params,
        }
        if chat:
            messages = [{"role": "user", "content": case.prompt}]
            return self.openai.chat.completions.create(messages=messages, **settings)
        return self.openai.completions.create(prompt=case.templated, **settings)


def ask(server, *requests):
    return ask_together(Client, server, requests)


def ask_all(server, cases):
    """Ask every case, in ways chosen at random; every answer must be that of transformers."""
    rng = random.Random(1)
    requests = []
    for case in cases:
        way = {
            "chat": rng.random() < 0.5,
            "stream": rng.random() < 0.5,
            **({"temperature": 0} if rng.random() < 0.5 else {}),
        }
        requests.append(lambda client, case=case, way=way: client.ask(case, **way))
    for case, answer in zip(cases, ask(server, *requests), strict=True):
        check(case, answer)


def check(case, answer):
    tokens, reason = answer
    assert tokens == case.tokens, case
    ended = len(tokens) < MAX_NEW_TOKENS or case.tokens[-1] == 96
    assert reason == ("stop" if ended else "length")


def check_nothing_leaks(server, case):
    ask(server, lambda client: client.ask(case))
    check_only_the_last_is_remembered(server)


def check_only_the_last_is_remembered(server):
    """vLLM tells its worker of a finished request with the next batch, so the last of all requests
    may still be remembered."""
    deadline = time.monotonic() + 60
    while server.remembered["requests"] > 1 and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(0.5)
    assert server.remembered["requests"] <= 1
    assert server.remembered["policies"] <= 1


class TestSameAsTransformers:
    def test_two_hundred_prompts(self, server, cases):
        """Every answer, by every way of asking, sixteen at a time."""
        steps, tokens = (
            "vllm:diffusion_num_denoising_steps_total",
            "vllm:diffusion_num_committed_tokens_total",
        )
        ask_all(server, cases)
        assert server.metric(tokens) == sum(len(case.tokens) for case in cases)
        assert server.metric(steps) >= sum(1 + max(case.committed_at) for case in cases)

    def test_blocks_of_a_known_prompt_are_not_computed_again(self, model, server, cases):
        """Only block-causal models can reuse them; the block in which the answer begins is new."""
        case = max(cases, key=lambda case: len(case.templated))
        (first,) = ask(server, lambda client: client.ask(case, chat=False))
        check(case, first)
        asked = {"prompt": case.templated, "model": "tiny"}
        tokens = httpx.post(f"{server.url}/tokenize", json=asked, timeout=60).json()["count"]
        before = server.metric("vllm:prefix_cache_hits_total")
        (second,) = ask(server, lambda client: client.ask(case, chat=False))
        check(case, second)
        known = (tokens - 1) // 32 * 32 if model == "tiny-sdar" else 0
        assert (known > 0) == (model == "tiny-sdar")
        assert server.metric("vllm:prefix_cache_hits_total") - before == known

    def test_compiled_and_preempted(self, model, cases, tmp_path):
        """Without --enforce-eager, and with a KV cache too small for all admitted requests."""
        with Server(
            tmp_path, model=folder_of(model), enforce_eager=False, **SMALL_CACHE
        ) as running:
            ask_all(running, cases)
            assert running.metric("vllm:num_preemptions_total") > 0
            check_nothing_leaks(running, cases[0])


class TestErrors:
    @pytest.mark.parametrize("path", ["chat/completions", "completions"])
    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            (
                {"vllm_xargs": {"decoding_plugin": "nope"}},
                "no policy 'nope'.*policies: .*coin, confidence_threshold",
            ),
            ({"vllm_xargs": {"decoding_plugin.threshold": 2}}, "at most 1"),
            (
                {"vllm_xargs": {"decoding_plugin": "fixed_schedule", "decoding_plugin.step": 2}},
                "its options are: steps",
            ),
            (
                {"vllm_xargs": {"decoding_plugin": "learn2pd", "decoding_plugin.filter": "/no"}},
                "request_paths",
            ),
            ({"vllm_xargs": {"decoding_plugin": "oracle"}}, "needs a reference: its option"),
            ({"vllm_xargs": {"diffusion_canvas_length": 8}}, "diffusion_canvas_length"),
            ({"vllm_xargs": {"decoding_plugin.cache": "block"}}, "^cache='block': .*choice"),
            ({"temperature": 1e-30}, "temperature=1e-30: expected 0 for greedy decoding"),
            ({"min_p": 1.5}, "min_p=1.5: expected a number from 0 to 1"),
            ({"n": 2}, "n=2: a request has one answer"),
            ({"logit_bias": {"5": 1}}, "logit_bias"),
            ({"repetition_penalty": 1.5}, "repetition_penalty=1.5: has no effect"),
        ],
        ids=lambda value: None if isinstance(value, str) else next(iter(value)),
    )
    def test_refused_and_the_next_one_served(self, server, cases, path, asked, said):
        case = cases[0]
        prompt = {
            "completions": {"prompt": case.templated},
            "chat/completions": {"messages": [{"role": "user", "content": case.prompt}]},
        }
        body = {"model": "tiny", **prompt[path], **asked}
        refused = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
        assert refused.status_code == 400, refused.text
        assert re.search(said, refused.json()["error"]["message"])
        (answer,) = ask(server, lambda client: client.ask(case))
        check(case, answer)

    def test_a_policy_that_raises(self, server, cases):
        """Among sixteen requests, only its own row continues with the progress rule."""
        bad = replace(cases[0], policy={"name": "raising", "after": 2})
        good = cases[1:CONCURRENCY]
        for _ in range(2):
            (tokens, reason), *answers = ask(
                server, *(lambda client, case=case: client.ask(case) for case in [bad, *good])
            )
            for case, answer in zip(good, answers, strict=True):
                check(case, answer)
            assert len(tokens) == MAX_NEW_TOKENS or reason == "stop"
        assert len(re.findall("policy 'raising': select failed", server.log)) == 1


class TestManyRequests:
    def test_a_fifth_of_them_cancelled(self, server, cases):
        chosen = some_cancelled(cases)
        requests = [
            lambda client, case=case, cancelled=cancelled, chunks=i % 3: (
                client.cancel(case, chunks) if cancelled else client.ask(case, stream=True)
            )
            for i, (case, cancelled) in enumerate(chosen)
        ]
        answers = ask(server, *requests)
        for (case, cancelled), answer in zip(chosen, answers, strict=True):
            if not cancelled:
                check(case, answer)
        check_nothing_leaks(server, cases[0])


class TestDocs:
    def test_the_openai_example(self, server):
        (block,) = re.findall(
            r"```python\n(from openai.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL
        )
        code = block.replace("http://localhost:8000", server.url)
        assert run_example(code).strip()

    def test_the_curl_example(self, server):
        (block,) = re.findall(r"```sh\n(curl.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
        command = block.replace("http://localhost:8000", server.url)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        (choice,) = json.loads(done.stdout)["choices"]
        assert choice["message"]["content"]
