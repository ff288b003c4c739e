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
from tests.engines.sglang.server import Server

MODEL = "tiny-sdar"
MODEL_CONTEXT = ModelContext(MODEL, 32, 97, 101, path=str(folder_of(MODEL)))
REFUSED = {
    "policy": [{"custom_params": {"unmask_policy": name}} for name in ("nope\n", "oracle", 5)],
    "option": [
        {"custom_params": {"threshold": 2}},
        {"custom_params": {"unmask_policy": "learn2pd", "filter": "/nowhere"}},
    ],
    "parameter": [{"frequency_penalty": 1}, {"regex": "a"}, {"custom_params": [1]}],
    "length": [{"max_new_tokens": 1_500}] * 2,
}


@pytest.fixture(scope="module")
def mix():
    return known_mix(MODEL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    # A KV cache that is smaller than the model's context, so that a request can be too large.
    with Server(folder, enable_metrics=True, max_total_tokens=1024) as running:
        yield running


def body(case, **params):
    settings = {
        "max_new_tokens": LONGEST,
        "custom_params": {"unmask_policy": case.name, **case.options},
        **params,
    }
    return {"text": case.templated, "sampling_params": settings}


class Client:
    def __init__(self, url):
        self.http = httpx.AsyncClient(base_url=url, timeout=300)

    async def generate(self, case):
        return (await self.http.post("/generate", json=body(case))).json()


def ask(server, cases):
    requests = [lambda client, case=case: client.generate(case) for case in cases]
    return ask_together(Client, server, requests)


def refuse_all(server, case):
    """Send what is refused, and say how many of each reason."""
    sent = Counter()
    for reason, requests in REFUSED.items():
        for params in requests:
            # SGLang asks about the length in its scheduler, when a stream has begun.
            for stream in (False, True) if reason != "length" else (False,):
                request = {**body(case, **params), "stream": stream}
                answer = httpx.post(f"{server.url}/generate", json=request, timeout=60)
                assert answer.status_code == 400, answer.text
                sent[reason] += 1
    answer = httpx.post(f"{server.url}/generate", json={"text": "x" * (5 << 20)}, timeout=60)
    assert answer.status_code == 413
    return {**sent, "body": 1}


@pytest.mark.parametrize("together", [True, False])
def test_exact_counts_after_a_known_mix(server, mix, together):
    """Together in one burst, and one after the other."""
    asked = mix if together else mix[::5]
    before = scraped(server)
    if together:
        answers = ask(server, asked)
        refused = refuse_all(server, asked[0])
    else:
        answers = [ask(server, [case])[0] for case in asked]
        refused = {}
    found = since(before, scraped(server))
    assert [answer["output_ids"] for answer in answers] == [case.tokens for case in asked]
    forwards = [answer["meta_info"]["nfe"] for answer in answers]
    assert without_times(found) == without_times(expected(asked, forwards, refused))
    for case, nfe in zip(asked, forwards, strict=True):
        # A forward pass for each block after its last step, which writes keys and values.
        assert nfe == case.steps + len(case.blocks)
    check_steps_timed(found, asked, together=together)


def test_a_cancelled_request_is_no_answer(server, mix):
    """Its steps are counted; it is in no histogram of answers."""
    before = scraped(server)
    slow = {"max_new_tokens": 600, "ignore_eos": True, "custom_params": None}
    request = {**body(mix[0], **slow), "stream": True}
    with httpx.stream("POST", f"{server.url}/generate", json=request, timeout=60) as response:
        for line in response.iter_lines():
            if '"output_ids":[' in line and '"output_ids":[]' not in line:
                break
    case = mix[0]
    ask(server, [case])
    found = since(before, scraped(server))
    check_one_of_two_was_cancelled(found, case)


def test_the_answer_names_policy_and_weights(server, mix):
    for name in ("settled", "confidence_threshold"):
        case = next(case for case in mix if case.name == name)
        (answer,) = ask(server, [case])
        policy = bind_policy(create_policy(case.policy), MODEL_CONTEXT)
        assert answer["meta_info"]["policy"] == name
        assert answer["meta_info"]["fingerprint"] == policy.fingerprint()
    assert policy.fingerprint() == ""


def test_the_log_says_where_the_metrics_are(server):
    assert len(re.findall(r"metrics of the policies: l2pd_\* on /metrics", server.log)) == 1


def test_labels_are_bounded(server):
    """After requests that name policies and options of all kinds."""
    policies = {spec.name for spec in list_policies()} | {OTHER}
    for key in scraped(server):
        label, value = key[-1]
        assert value in (policies if label == "policy" else REASONS)
