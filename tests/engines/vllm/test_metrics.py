"""The Prometheus endpoint of a real server, after a known mix of requests."""

import re
from collections import Counter

import httpx
import pytest

from l2pd_adapters.metrics import OTHER, REASONS
from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins import ModelContext, create_policy, list_policies
from l2pd_plugins.plugins import bind_policy
from tests.engines.counting import (
    LONGEST,
    check_one_of_two_was_cancelled,
    check_steps_timed,
    expected,
    known_mix,
    scraped,
    since,
    without_times,
)
from tests.engines.launching import ask_together
from tests.engines.vllm.server import Server

REFUSED = {
    "policy": [{"decoding_plugin": name} for name in ("nope\n", "oracle")],
    "option": [
        {"decoding_plugin.threshold": 2},
        {"decoding_plugin": "learn2pd", "decoding_plugin.filter": "/nowhere"},
    ],
}
WITHOUT_EFFECT = ({"frequency_penalty": 1}, {"logit_bias": {"5": 1}}, {"use_beam_search": True})


@pytest.fixture(scope="module", params=["tiny-sdar", "tiny-llada"])
def model(request):
    return request.param


@pytest.fixture(scope="module")
def mix(model):
    return known_mix(model)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with Server(tmp_path_factory.mktemp(model), model=folder_of(model)) as running:
        yield running


def body(case, **more):
    options = {f"decoding_plugin.{name}": value for name, value in case.options.items()}
    return {
        "model": "tiny",
        "prompt": case.templated,
        "max_tokens": LONGEST,
        "vllm_xargs": {"decoding_plugin": case.name, **options},
        "return_token_ids": True,
        **more,
    }


class Client:
    def __init__(self, url):
        self.http = httpx.AsyncClient(base_url=url, timeout=300)

    async def complete(self, case):
        (choice,) = (await self.http.post("/v1/completions", json=body(case))).json()["choices"]
        return choice


def ask(server, cases):
    requests = [lambda client, case=case: client.complete(case) for case in cases]
    return ask_together(Client, server, requests)


def refuse_all(server, case):
    """Send what is refused, and say how many of each reason."""
    sent = Counter()
    for reason, each in REFUSED.items():
        sent[reason] += len(each)
        for xargs in each:
            refuse(server, body(case, vllm_xargs=xargs), 400)
    for field in WITHOUT_EFFECT:
        for stream in (False, True):
            refuse(server, body(case, stream=stream, **field), 400)
            sent["parameter"] += 1
    refuse(server, body(case, prompt="x" * (5 << 20)), 413)
    return {**sent, "body": 1}


def refuse(server, request, status):
    answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=60)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize("together", [True, False])
def test_exact_counts_after_a_known_mix(server, model, mix, together):
    """Together in one burst, and one after the other."""
    asked = mix if together else mix[::5]
    before = scraped(server)
    if together:
        choices = ask(server, asked)
        refused = refuse_all(server, asked[0])
    else:
        choices = [ask(server, [case])[0] for case in asked]
        refused = {}
    found = since(before, scraped(server))
    assert [choice["token_ids"] for choice in choices] == [case.tokens for case in asked]
    forwards = [choice["meta_info"]["nfe"] for choice in choices]
    assert without_times(found) == without_times(expected(asked, forwards, refused))
    for case, nfe, choice in zip(asked, forwards, choices, strict=True):
        # Block-causal models write the keys and values of each block but the last.
        writes = len(case.blocks) - 1 if model == "tiny-sdar" else 0
        assert nfe == case.steps + writes
        assert choice["meta_info"]["tokens_per_forward"] == len(case.tokens) / nfe
    check_steps_timed(found, asked, together=together)


def test_a_cancelled_request_is_no_answer(server, mix):
    """Its steps are counted; it is in no histogram of answers."""
    case, before = mix[0], scraped(server)
    request = {**body(case, stream=True, ignore_eos=True, max_tokens=350), "vllm_xargs": None}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=60) as response:
        next(line for line in response.iter_lines() if '"text":' in line)
    ask(server, [case])
    found = since(before, scraped(server))
    check_one_of_two_was_cancelled(found, case)


def test_a_stop_string_ends_an_answer(server, mix):
    """vLLM looks for it in the process that answers, and aborts the request in the engine."""
    case = mix[0]
    before = scraped(server)
    (stop,) = case.text[2:3]
    answer = httpx.post(
        f"{server.url}/v1/completions", json=body(case, stop=[stop]), timeout=60
    ).json()["choices"][0]
    assert answer["stop_reason"] == stop
    found = since(before, scraped(server))
    label = ("policy", case.name)
    assert found["l2pd_request_forwards_count", label] == 1
    assert found["l2pd_request_forwards_sum", label] == answer["meta_info"]["nfe"]


def test_each_prompt_and_each_endpoint_names_its_decode(server, model, mix):
    cases = [next(c for c in mix if c.name == name) for name in ("settled", "fixed_schedule")]
    for case in cases:
        context = ModelContext(model, 32, 97, 101, path=str(folder_of(model)))
        policy = bind_policy(create_policy(case.policy), context)
        told = {"policy": case.name, "fingerprint": policy.fingerprint()}
        request = body(case, prompt=[case.templated, case.templated])
        answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=60).json()
        first, second = answer["choices"]
        assert first["meta_info"] == second["meta_info"]
        assert first["meta_info"].items() >= told.items()
        assert answer["kv_transfer_params"] is None
        messages = [{"role": "user", "content": case.prompt}]
        request = {key: value for key, value in body(case).items() if key != "prompt"}
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json={**request, "messages": messages}, timeout=60
        ).json()
        assert answer["choices"][0]["meta_info"] == first["meta_info"]
        assert answer["kv_transfer_params"] is None


def test_the_log_says_where_the_metrics_are(server):
    assert len(re.findall(r"metrics of the policies: l2pd_\* on /metrics", server.log)) == 1


def test_labels_are_bounded(server):
    """After requests that name policies and options of all kinds."""
    policies = {spec.name for spec in list_policies()} | {OTHER}
    for key in scraped(server):
        label, value = key[-1]
        assert value in (policies if label == "policy" else REASONS)
