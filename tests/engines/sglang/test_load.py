"""More requests than the KV cache has room for: they wait for each other, and all are answered."""

import asyncio
import time

import httpx
import pytest

from tests.engines.cases import decoded, random_requests
from tests.engines.sglang.server import Server

TOKENS = 1536
"""Tokens of the KV cache: it has room for three answers of 448 tokens; sixteen may run."""
POLICY = {"name": "confidence_threshold", "threshold": 0.9}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server"), max_total_tokens=TOKENS) as running:
        yield running


@pytest.fixture(scope="module")
def cases():
    made = decoded("tiny-sdar", random_requests((POLICY,), 32), 128)
    return [case for case in made if len(case.tokens) < 128]


def ask_all(url, requests):
    """The answers to these chats (prompt, parameters), all asked at once."""

    async def run():
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            return await asyncio.gather(
                *(
                    client.post(
                        "/v1/chat/completions",
                        json={
                            "model": "default",
                            "messages": [{"role": "user", "content": prompt}],
                            **params,
                        },
                    )
                    for prompt, params in requests
                )
            )

    return asyncio.run(run())


def test_answers_that_may_be_long(server, cases):
    """Each answer may take a third of the cache, but ends long before that."""
    answers = ask_all(server.url, [(case.prompt, {"max_tokens": 448}) for case in cases])
    assert [answer.status_code for answer in answers] == [200] * len(cases)
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [case.text for case in cases]


def test_answers_that_are_long(server, cases):
    params = {"max_tokens": 300, "ignore_eos": True}
    answers = ask_all(server.url, [(case.prompt, params) for case in cases[:8]])
    assert [answer.status_code for answer in answers] == [200] * 8
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [300] * 8


def test_the_longest_that_fits(server, cases):
    """The long request runs alone; the short ones after it wait and are answered."""
    requests = [(cases[0].prompt, {"max_tokens": 1400, "ignore_eos": True})]
    requests += [(case.prompt, {"max_tokens": 64}) for case in cases[:4]]
    answers = ask_all(server.url, requests)
    assert [answer.status_code for answer in answers] == [200] * 5


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_never_fits_is_refused(server, stream):
    (answer,) = ask_all(server.url, [("Sort: cab", {"max_tokens": 1530, "stream": stream})])
    said = answer.text
    assert "max_new_tokens=1530" in said and "KV cache; expected at most" in said
    assert answer.status_code == 400 or stream


def test_the_server_is_well(server, cases):
    (answer,) = ask_all(server.url, [(cases[0].prompt, {"max_tokens": 64})])
    assert answer.json()["choices"][0]["message"]["content"] == cases[0].text
    deadline = time.monotonic() + 30
    while server.remembered and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.remembered == 0
    assert "cannot be decoded" not in server.log


@pytest.mark.parametrize(
    "flags", [{"disable_radix_cache": True}, {"enable_priority_scheduling": True}], ids=str
)
def test_other_ways_to_schedule(tmp_path, cases, flags):
    """Without a prefix cache; and with priorities, some of which would preempt other requests."""
    with Server(tmp_path, max_total_tokens=TOKENS, **flags) as running:
        for params in ({"max_tokens": 448}, {"max_tokens": 200, "ignore_eos": True}):
            requests = [
                (case.prompt, {**params, "priority": 100 * (index % 2)})
                for index, case in enumerate(cases)
            ]
            answers = ask_all(running.url, requests)
            assert [answer.status_code for answer in answers] == [200] * len(cases)
        assert "cannot be decoded" not in running.log
