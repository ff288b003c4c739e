"""Sampling and log-probabilities on a real server, against the transformers adapter."""

import asyncio
import json
from dataclasses import replace

import httpx
import pytest

from l2pd_adapters.tiny_models import folder_of
from tests.engines.launching import ask_together
from tests.engines.sampled import (
    PAGE,
    TOP,
    ask_example,
    check_log_probabilities,
    sampled,
    shown_in,
)
from tests.engines.vllm.server import Server
from tests.engines.vllm.test_server import (
    SMALL_CACHE,
    check_only_the_last_is_remembered,
    policies_of,
)

CONCURRENCY, MAX_NEW_TOKENS = 16, 128
COUNTS = {"tiny-sdar": 100, "tiny-llada": 40}


@pytest.fixture(scope="module", params=COUNTS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def cases(model):
    return sampled(model, policies_of(model), COUNTS[model], MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """With a KV cache too small for all admitted requests, so that some are preempted."""
    with Server(tmp_path_factory.mktemp(model), model=folder_of(model), **SMALL_CACHE) as running:
        yield running


def body_of(case, *, chat=True, **more):
    options = {f"decoding_plugin.{name}": value for name, value in case.options.items()}
    wanted = {"logprobs": True, "top_logprobs": TOP} if chat else {"logprobs": TOP}
    prompt = (
        {"messages": [{"role": "user", "content": case.prompt}]}
        if chat
        else {"prompt": case.templated}
    )
    return {
        "model": "tiny",
        "max_tokens": MAX_NEW_TOKENS,
        "vllm_xargs": {"decoding_plugin": case.policy["name"], **options},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **prompt,
        **wanted,
        **case.sampling,
        **({} if case.seed is None else {"seed": case.seed}),
        **more,
    }


class Client:
    """Asks the server, sixteen requests at a time."""

    def __init__(self, url):
        self.http = httpx.AsyncClient(base_url=f"{url}/v1", timeout=600)
        self.room = asyncio.Semaphore(CONCURRENCY)

    async def ask(self, case, *, chat=True, stream=False, **more):
        """The token ids of an answer; their log-probabilities; and the most probable ones."""
        path = "chat/completions" if chat else "completions"
        body = body_of(case, chat=chat, stream=stream, **more)
        async with self.room:
            if not stream:
                answer = await self.http.post(path, json=body)
                assert answer.status_code == 200, answer.text
                parts = [answer.json()]
            else:
                parts = [event async for event in self.events(path, body)]
        tokens, values, top = [], [], []
        for choice in (choice for part in parts for choice in part["choices"]):
            tokens += choice.get("token_ids") or []
            if chat:
                for token in (choice.get("logprobs") or {}).get("content") or ():
                    values.append(token["logprob"])
                    top.append([(named(t["token"]), t["logprob"]) for t in token["top_logprobs"]])
            elif choice.get("logprobs"):
                values += choice["logprobs"]["token_logprobs"]
                rows = choice["logprobs"]["top_logprobs"]
                # The token itself follows if it is not among them.
                top += [[(named(t), v) for t, v in sorted_by_value(row)][:TOP] for row in rows]
        return tokens, values, top

    async def events(self, path, body):
        async with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))

    async def hang_up(self, case):
        body = body_of(case, stream=True, ignore_eos=True, max_tokens=300)
        async with self.room:
            async for _ in self.events("chat/completions", body):
                return


def named(token):
    return int(token.removeprefix("token_id:"))


def sorted_by_value(row):
    return sorted(row.items(), key=lambda pair: -pair[1])


def ask(server, requests):
    return ask_together(Client, server, requests)


def check(case, answer, *, chat=True):
    tokens, values, top = answer
    assert tokens == case.tokens
    if chat:  # vLLM puts the token itself first, and leaves out the last one for it
        own = zip(case.tokens, case.log_probabilities, strict=True)
        rows = [
            [*{token: value, **dict(row)}.items()][:TOP]
            for (token, value), row in zip(own, case.top, strict=True)
        ]
        case = replace(case, top=rows)
    check_log_probabilities(case, values, top)


class TestSameAsTransformers:
    def test_in_batches_also_when_requests_are_preempted(self, server, cases):
        ways = [{"chat": at % 2 == 0, "stream": at % 4 < 2} for at in range(len(cases))]
        answers = ask(
            server,
            [
                lambda client, case=case, way=way: client.ask(case, **way)
                for case, way in zip(cases, ways, strict=True)
            ],
        )
        for case, way, answer in zip(cases, ways, answers, strict=True):
            check(case, answer, chat=way["chat"])
        assert server.metric("vllm:num_preemptions_total") > 0

    def test_alone(self, server, cases):
        for case in cases:
            (answer,) = ask(server, [lambda client, case=case: client.ask(case, chat=False)])
            check(case, answer, chat=False)


class TestSeeds:
    def test_requests_without_a_seed_differ(self, server, cases):
        drawn = [case for case in cases if case.seed is not None]
        case = min(drawn, key=lambda case: sum(case.log_probabilities))  # the least certain
        answers = ask(server, [lambda client: client.ask(case, seed=None) for _ in range(6)])
        assert len({tuple(tokens) for tokens, _, _ in answers}) > 1

    def test_a_request_that_says_nothing_is_greedy(self, server, cases):
        case = next(case for case in cases if case.seed is None)
        says_nothing = ({}, {"top_p": 1}, {"seed": 5}, {"temperature": 0}, {"top_k": -1})
        answers = ask(
            server,
            [lambda client, more=more: client.ask(case, **more) for more in says_nothing],
        )
        for answer in answers:
            check(case, answer)


class TestCancelled:
    def test_a_cancelled_request_leaves_nothing_behind(self, server, cases):
        answers = ask(
            server,
            [
                lambda client, case=case, at=at: (
                    client.hang_up(case) if at % 3 else client.ask(case)
                )
                for at, case in enumerate(cases)
            ],
        )
        for at, (case, answer) in enumerate(zip(cases, answers, strict=True)):
            if at % 3 == 0:
                check(case, answer)
        greedy = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={
                "model": "tiny",
                "messages": [{"role": "user", "content": "Sort: ba"}],
                "max_tokens": 8,
            },
            timeout=60,
        )
        assert greedy.json()["choices"][0]["logprobs"] is None
        check_only_the_last_is_remembered(server)


class TestDocs:
    def test_the_example(self, server, model):
        if model != "tiny-sdar":
            pytest.skip("the page shows the answer of tiny-sdar")
        (answer,) = ask_example(PAGE, "localhost:8000", server.url)
        (wanted,) = [shown for shown in shown_in(PAGE) if "choices" in shown]
        found, shown = (each["choices"][0]["logprobs"]["content"] for each in (answer, wanted))
        for token, expected in zip(found, shown, strict=True):
            assert token["token"] == expected["token"]
            for most, theirs in zip(
                [token, *token["top_logprobs"]], [expected, *expected["top_logprobs"]], strict=True
            ):
                assert most["token"] == theirs["token"]
                assert most["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
