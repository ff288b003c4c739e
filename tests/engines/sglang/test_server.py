"""A real server, launched with the documented command, against the transformers adapter."""

import asyncio
import json
import random
import re
import subprocess
import time

import httpx
import pytest
from openai import AsyncOpenAI

from tests.engines.cases import (
    Case,
    decoded,
    learned_policies,
    random_requests,
    some_cancelled,
)
from tests.engines.golden import MAX_NEW_TOKENS as GOLDEN_LENGTH
from tests.engines.golden import golden
from tests.engines.ignored_end import MAX_NEW_TOKENS as IGNORING_LENGTH
from tests.engines.ignored_end import POLICY as EDITING
from tests.engines.ignored_end import answers as answers_with_edits
from tests.engines.launching import ask_together, run_example
from tests.engines.sglang.server import DOCS, Server

MODEL = "tiny-sdar"
PROMPTS, CONCURRENCY, MAX_NEW_TOKENS = 200, 16, 128
POLICIES = (
    {"name": "confidence_threshold", "threshold": 0.8},
    {"name": "fixed_schedule"},
    {"name": "fixed_schedule", "steps": 48},
    {"name": "persistent"},
    *learned_policies(MODEL),
)


@pytest.fixture(scope="module")
def cases():
    return decoded(MODEL, random_requests(POLICIES, PROMPTS), MAX_NEW_TOKENS)


def custom_params(case):
    return {"unmask_policy": case.policy["name"], **case.options}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as running:
        yield running


class Client:
    """Asks the server in each of the ways that the docs show."""

    def __init__(self, url):
        self.http = httpx.AsyncClient(base_url=url, timeout=300)
        self.openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self.room = asyncio.Semaphore(CONCURRENCY)

    async def generate(self, case, *, stream=False, **params):
        """(token ids, meta_info) of /generate."""
        async with self.room:
            if not stream:
                answer = (await self.http.post("/generate", json=_body(case, **params))).json()
            async for event in self._events(case, **params) if stream else _none():
                answer = event
        return answer["output_ids"], answer["meta_info"]

    async def chat(self, case, *, stream=False):
        """(text, number of tokens) of /v1/chat/completions."""
        async with self.room:
            answer = await self.openai.chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": case.prompt}],
                max_tokens=MAX_NEW_TOKENS,
                extra_body={"custom_params": custom_params(case)},
                **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
            )
            if not stream:
                return answer.choices[0].message.content, answer.usage.completion_tokens
            text, count = "", 0
            async for chunk in answer:
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                count = chunk.usage.completion_tokens if chunk.usage else count
            return text, count

    async def cancel(self, case):
        """Begin a long answer, and hang up in the middle of it."""
        async with self.room:
            slow = {"unmask_policy": "fixed_schedule"}
            async for event in self._events(
                case, custom_params=slow, ignore_eos=True, max_new_tokens=300
            ):
                if event["output_ids"]:
                    return

    async def _events(self, case, **params):
        body = {**_body(case, **params), "stream": True}
        async with self.http.stream("POST", "/generate", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


def _body(case, **params):
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "custom_params": custom_params(case), **params}
    return {"text": case.templated, "sampling_params": settings}


async def _none():
    return
    yield


def ask(server, *requests):
    return ask_together(Client, server, requests)


def check_generated(case, answer):
    tokens, meta = answer
    assert tokens == case.tokens
    assert meta["step_map"] == case.committed_at
    assert meta["nfe"] > max(case.committed_at)
    assert meta["tokens_per_forward"] == pytest.approx(len(tokens) / meta["nfe"])


class TestSameAsTransformers:
    def test_two_hundred_prompts(self, server, cases):
        """Every answer, by every way of asking, sixteen at a time."""
        ways = [random.Random(1).choice(range(4)) for _ in cases]
        assert len(POLICIES) >= 4
        assert all(policy in [case.policy for case in cases] for policy in POLICIES)
        answers = ask(
            server,
            *(
                lambda client, case=case, way=way: (
                    client.chat(case, stream=way % 2 == 1)
                    if way < 2
                    else client.generate(case, stream=way % 2 == 1)
                )
                for case, way in zip(cases, ways, strict=True)
            ),
        )
        for case, way, answer in zip(cases, ways, answers, strict=True):
            if way < 2:
                assert answer == (case.text, len(case.tokens))
            else:
                check_generated(case, answer)


class TestErrors:
    @pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
    @pytest.mark.parametrize(
        ("custom_params", "said"),
        [
            ({"unmask_policy": "nope"}, "no policy 'nope'.*policies: .*coin, confidence_threshold"),
            ({"unmask_policy": "confidence_threshold", "threshold": 2}, "at most 1"),
            ({"unmask_policy": "fixed_schedule", "step": 2}, "its options are: steps"),
            ({"unmask_policy": "learn2pd", "filter": "/nowhere"}, "request_paths"),
        ],
    )
    def test_refused_and_the_next_one_served(self, server, cases, path, custom_params, said):
        case = cases[0]
        if path == "/generate":
            body = _body(case, custom_params=custom_params)
        else:
            body = {
                "model": "default",
                "prompt": case.templated,
                "messages": [{"role": "user", "content": case.prompt}],
                "custom_params": custom_params,
            }
        refused = httpx.post(f"{server.url}{path}", json=body, timeout=60)
        assert refused.status_code == 400
        assert re.search(said, refused.text), refused.text
        (answer,) = ask(server, lambda client: client.generate(case))
        check_generated(case, answer)

    def test_a_stream_is_refused_before_it_begins(self, server, cases):
        body = {**_body(cases[0], custom_params={"unmask_policy": "nope"}), "stream": True}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        assert answer.status_code == 400
        assert "no policy 'nope'" in answer.json()["error"]["message"]

    def test_a_policy_that_raises(self, server, cases):
        """Among sixteen requests, only its own row continues with the progress rule."""
        bad = Case(**{**vars(cases[0]), "policy": {"name": "raising", "after": 2}})
        good = cases[1:CONCURRENCY]
        for _ in range(2):
            first, *answers = ask(
                server,
                *(lambda client, case=case: client.generate(case) for case in [bad, *good]),
            )
            for case, answer in zip(good, answers, strict=True):
                check_generated(case, answer)
            tokens, meta = first
            assert len(tokens) == MAX_NEW_TOKENS or meta["finish_reason"]["type"] == "stop"
            assert meta["nfe"] >= len(tokens)  # one token a step
        assert len(re.findall("policy 'raising': select failed", server.log)) == 1


class TestManyRequests:
    def test_a_fifth_of_them_cancelled(self, server, cases):
        chosen = some_cancelled(cases)
        answers = ask(
            server,
            *(
                lambda client, case=case, cancelled=cancelled: (
                    client.cancel(case) if cancelled else client.generate(case)
                )
                for case, cancelled in chosen
            ),
        )
        wrong = [
            i
            for i, ((case, cancelled), answer) in enumerate(zip(chosen, answers, strict=True))
            if not cancelled and answer[0] != case.tokens
        ]
        assert wrong == []
        deadline = time.monotonic() + 60
        while server.remembered and time.monotonic() < deadline:
            time.sleep(0.5)
        assert server.remembered == 0


class TestGoldenTraces:
    def test_tokens_and_the_steps_that_committed_them(self, server, cases):
        """The traces are the same as those of the other engines."""
        template = cases[0].templated.split(cases[0].prompt)
        for policy, golden_cases in golden():
            wanted = [
                Case(
                    prompt=case["prompt"],
                    templated=case["prompt"].join(template),
                    policy=policy,
                    tokens=case["tokens"],
                    text="",
                    committed_at=case["committed_at"],
                )
                for case in golden_cases
            ]
            answers = ask(
                server,
                *(
                    lambda client, case=case: client.generate(case, max_new_tokens=GOLDEN_LENGTH)
                    for case in wanted
                ),
            )
            for case, answer in zip(wanted, answers, strict=True):
                check_generated(case, answer)


class TestIgnoredEnd:
    def test_edits_of_an_end_of_text(self, server):
        """As in transformers: such edits are allowed only if the end of text is ignored."""
        wanted = answers_with_edits(MODEL)
        requests = [
            (Case("", templated, EDITING, tokens, "", []), ignore_eos)
            for templated, _, ignoring, ending in wanted
            for ignore_eos, tokens in ((True, ignoring), (False, ending))
        ]
        answers = ask(
            server,
            *(
                lambda client, case=case, ignore_eos=ignore_eos: client.generate(
                    case, max_new_tokens=IGNORING_LENGTH, ignore_eos=ignore_eos
                )
                for case, ignore_eos in requests
            ),
        )
        assert [tokens for tokens, _ in answers] == [case.tokens for case, _ in requests]


class TestSyncMode:
    def test_the_same_answers(self, tmp_path, cases):
        with Server(tmp_path, no_dllm_fdfo=True, dllm_algorithm="FixedSchedule") as running:
            answers = ask(
                running,
                *(lambda client, case=case: client.generate(case) for case in cases[:60]),
            )
        for case, answer in zip(cases, answers, strict=False):
            check_generated(case, answer)


class TestDocs:
    def test_the_openai_example(self, server):
        (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
        code = block.replace("http://localhost:30000", server.url)
        text, tokens_per_forward = run_example(code).splitlines()
        assert text
        assert 0 < float(tokens_per_forward) < 3

    def test_the_curl_examples(self, server):
        blocks = re.findall(r"```sh\n(curl.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
        assert len(blocks) == 2
        for block in blocks:
            command = block.replace("http://localhost:30000", server.url)
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, check=True
            )
            answer = json.loads(done.stdout)
            meta = answer.get("meta_info") or answer["choices"][0]["meta_info"]
            assert meta["nfe"] > 0
