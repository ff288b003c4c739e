"""Sampling and log-probabilities on a real server, against the transformers adapter."""

import asyncio
import json
import time

import httpx
import numpy as np
import pytest

from tests.engines.launching import ask_together
from tests.engines.sampled import (
    PAGE,
    TOP,
    ask_example,
    check_log_probabilities,
    sampled,
    shown_in,
)
from tests.engines.sglang.server import Server
from tests.engines.sglang.test_server import POLICIES

COUNT, CONCURRENCY, MAX_NEW_TOKENS = 100, 16, 64


@pytest.fixture(scope="module")
def cases():
    return sampled("tiny-sdar", POLICIES, COUNT, MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as running:
        yield running


def params_of(case, **more):
    chosen = {"unmask_policy": case.policy["name"], **case.options}
    seed = {} if case.seed is None else {"sampling_seed": case.seed}
    return {
        "max_new_tokens": MAX_NEW_TOKENS,
        "custom_params": chosen,
        **case.sampling,
        **seed,
        **more,
    }


def body_of(case, **more):
    return {
        "text": case.templated,
        "sampling_params": params_of(case),
        "return_logprob": True,
        "top_logprobs_num": TOP,
        **more,
    }


def chat_body(case, **more):
    seed = {} if case.seed is None else {"seed": case.seed}
    return {
        "model": "default",
        "messages": [{"role": "user", "content": case.prompt}],
        "max_tokens": MAX_NEW_TOKENS,
        "custom_params": params_of(case)["custom_params"],
        "logprobs": True,
        "top_logprobs": TOP,
        **case.sampling,
        **seed,
        **more,
    }


class Client:
    """Asks the server, sixteen requests at a time."""

    def __init__(self, url):
        self.http = httpx.AsyncClient(base_url=url, timeout=300)
        self.room = asyncio.Semaphore(CONCURRENCY)

    async def post(self, path, body):
        async with self.room:
            answer = await self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def events(self, path, body):
        """The events of a stream."""
        async with (
            self.room,
            self.http.stream("POST", path, json={**body, "stream": True}) as response,
        ):
            assert response.status_code == 200
            lines = [line async for line in response.aiter_lines()]
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def ask(server, requests):
    return ask_together(Client, server, requests)


def check(case, answer):
    """An answer of /generate."""
    meta = answer["meta_info"]
    assert answer["output_ids"] == case.tokens
    assert meta["step_map"] == case.committed_at
    assert meta["step_maps"] == [1 + step for step in case.committed_at]
    told = meta["output_token_logprobs"]
    assert [token for _, token, _ in told] == case.tokens
    top = [[(token, value) for value, token, _ in row] for row in meta["output_top_logprobs"]]
    check_log_probabilities(case, [value for value, _, _ in told], top)
    assert "seed" not in meta


class TestSameAsTransformers:
    def test_in_batches(self, server, cases):
        assert {policy["name"] for policy in POLICIES} == {c.policy["name"] for c in cases}
        assert len({json.dumps(case.sampling) for case in cases}) == 7
        answers = ask(
            server,
            [lambda client, case=case: client.post("/generate", body_of(case)) for case in cases],
        )
        for case, answer in zip(cases, answers, strict=True):
            check(case, answer)

    def test_alone(self, server, cases):
        with httpx.Client(base_url=server.url, timeout=300) as client:
            for case in cases:
                check(case, client.post("/generate", json=body_of(case)).json())

    def test_one_batch_of_prompts(self, server, cases):
        body = {
            "text": [case.templated for case in cases],
            "sampling_params": [params_of(case) for case in cases],
        }
        answers = httpx.post(f"{server.url}/generate", json=body, timeout=300).json()
        assert [answer["output_ids"] for answer in answers] == [case.tokens for case in cases]

    def test_streams(self, server, cases):
        """The last event has everything."""
        some = cases[:20]
        answers = ask(
            server,
            [lambda client, case=case: client.events("/generate", body_of(case)) for case in some],
        )
        for case, events in zip(some, answers, strict=True):
            check(case, events[-1])


class TestOpenAI:
    @pytest.mark.parametrize("stream", [False, True])
    def test_chats(self, server, cases, stream):
        some = cases[:30]
        answers = ask(
            server,
            [
                lambda client, case=case: (
                    client.events("/v1/chat/completions", chat_body(case))
                    if stream
                    else client.post("/v1/chat/completions", chat_body(case))
                )
                for case in some
            ],
        )
        for case, answer in zip(some, answers, strict=True):
            parts = answer if stream else [answer]
            content = [
                token
                for part in parts
                for choice in part["choices"]
                for token in (choice["logprobs"] or {}).get("content") or ()
            ]
            values = [token["logprob"] for token in content]
            assert values == pytest.approx(case.log_probabilities, abs=1e-4)
            for token, wanted in zip(content, case.top, strict=True):
                found = [each["logprob"] for each in token["top_logprobs"]]
                assert found == pytest.approx([exact for _, exact in wanted], abs=1e-4)

    def test_completions(self, server, cases):
        some = cases[:20]
        answers = ask(
            server,
            [
                lambda client, case=case: client.post(
                    "/v1/completions",
                    {
                        **{k: v for k, v in chat_body(case).items() if k != "top_logprobs"},
                        "prompt": case.templated,
                        "logprobs": TOP,
                    },
                )
                for case in some
            ],
        )
        for case, answer in zip(some, answers, strict=True):
            told = answer["choices"][0]["logprobs"]
            assert told["token_logprobs"] == pytest.approx(case.log_probabilities, abs=1e-4)
            assert all(len(row) == TOP for row in told["top_logprobs"])


class TestSeeds:
    def test_a_request_without_a_seed_gets_one_and_says_it(self, server, cases):
        drawn = [case for case in cases if case.sampling == {"temperature": 1.0}]
        case = min(drawn, key=lambda case: sum(case.log_probabilities))  # the least certain
        body = body_of(case)
        del body["sampling_params"]["sampling_seed"]
        seeds, texts = set(), set()
        for _ in range(6):
            answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
            seed = answer["meta_info"]["seed"]
            again = {**body, "sampling_params": params_of(case, sampling_seed=seed)}
            same = httpx.post(f"{server.url}/generate", json=again, timeout=60).json()
            assert same["output_ids"] == answer["output_ids"]
            seeds.add(seed)
            texts.add(answer["text"])
        assert len(seeds) == 6 and len(texts) > 1

    def test_a_request_that_says_nothing_is_greedy(self, server, cases):
        case = next(case for case in cases if case.seed is None)
        for more in ({}, {"top_p": 1}, {"seed": 5}, {"temperature": 0}):
            body = chat_body(case, **more)
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
            values = [t["logprob"] for t in answer["choices"][0]["logprobs"]["content"]]
            assert values == pytest.approx(case.log_probabilities, abs=1e-4)


class TestCancelled:
    def test_a_cancelled_request_leaves_nothing_behind(self, server, cases):
        async def hang_up(client, case):
            body = body_of(case, sampling_params=params_of(case, ignore_eos=True), stream=True)
            async with client.room, client.http.stream("POST", "/generate", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        return

        answers = ask(
            server,
            [
                lambda client, case=case, at=at: (
                    hang_up(client, case) if at % 3 else client.post("/generate", body_of(case))
                )
                for at, case in enumerate(cases)
            ],
        )
        for at, (case, answer) in enumerate(zip(cases, answers, strict=True)):
            if at % 3 == 0:
                check(case, answer)
        deadline = time.monotonic() + 60
        while server.remembered and time.monotonic() < deadline:
            time.sleep(0.5)
        assert server.remembered == 0


class TestDocs:
    def test_the_example(self, server):
        (answer,) = ask_example(PAGE, "localhost:30000", server.url)
        (wanted,) = [shown for shown in shown_in(PAGE) if "meta_info" in shown]
        assert answer["output_ids"] == wanted["output_ids"]
        for key, values in wanted["meta_info"].items():
            found = answer["meta_info"][key]
            assert np.array(found, dtype=float) == pytest.approx(
                np.array(values, dtype=float), abs=1e-4, nan_ok=True
            )
