"""Hostile requests on a real server: each is refused, and the server keeps answering."""

import json

import httpx
import pytest

from l2pd_adapters.tiny_models import folder_of
from tests.engines import hostile
from tests.engines.every_path import check_every_path
from tests.engines.hostile import BAD_NAMES, DEEP, HUGE, LONG, NO_EFFECT_OPENAI, STRICT_TOOL
from tests.engines.vllm.server import Server

PATHS = ("/v1/chat/completions", "/v1/completions")
XARGS = "vllm_xargs"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    launched = Server(tmp_path_factory.mktemp("server"), model=folder_of("tiny-sdar"))
    with hostile.strangers_welcome(launched) as running:
        yield running


def body_of(path, stream, **params):
    """A request that would be served, with these parameters."""
    return hostile.completion_body(path, stream, model="tiny", **params)


def asking(name, **options):
    """The extra arguments that choose a policy and set its options."""
    options = {f"decoding_plugin.{key}": value for key, value in options.items()}
    return {"decoding_plugin": name, **options}


def policies(folder):
    turns = hostile.alternating(PATHS)
    for name, options in hostile.bad_options(folder):
        if any(str(value) in ("True", "[True]") for value in options.values()):
            continue  # which vLLM reads as 1
        path, stream = next(turns)
        yield path, body_of(path, stream, **{XARGS: asking(name, **options)})
    for name in (*BAD_NAMES, 5, True, ["oracle"], DEEP):
        path, stream = next(turns)
        yield path, body_of(path, stream, **{XARGS: {"decoding_plugin": name}})
    for extra in (
        "s",
        5,
        [1],
        [[]],
        True,
        {"decoding_plugin": DEEP},
        {"decoding_plugin.threshold.x": 1},
        {"decoding_plugin.": 1},
        {"decoding_plugin.cache": "dual"},
        {"decoding_plugin.cache": ["dual"]},
        {"decoding_plugin.cache": DEEP},
        {"diffusion_constrained": 1},
        {**asking("confidence_threshold"), **{f"decoding_plugin.a{i}": 1 for i in range(99)}},
        {f"decoding_plugin.{LONG}": 1},
    ):
        for path in PATHS:
            yield path, body_of(path, False, **{XARGS: extra})


NO_EFFECT = (
    *NO_EFFECT_OPENAI,
    ("structured_outputs", {"json": "{}"}),
    ("structured_outputs", {"grammar": 'root ::= "a"'}),
    ("tools", [STRICT_TOOL]),
    ("watermarking", True),
    ("custom_params", {"unmask_policy": "klass"}),
    ("decoding_plugin", "klass"),
)
WRONG_PARAMETERS = (
    ("ignore_eos", "perhaps"),
    ("max_tokens", "x"),
    ("max_tokens", -1),
    ("max_tokens", 0.5),
    ("max_tokens", HUGE),
    ("max_tokens", 2**70),
    ("max_tokens", [HUGE]),
    ("allowed_token_ids", [2**70]),
    ("allowed_token_ids", [-1]),
    ("bad_words", [LONG]),
    ("priority", 2**70),
    ("priority", "x"),
    ("kv_transfer_params", "x"),
    ("structured_outputs", "x"),  # which vLLM's validation fails at
    ("stop_token_ids", [2**40]),
    ("n", HUGE),
    ("stop", 5),
    ("stop_token_ids", [2**70]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["x"]),
    ("seed", 2**70),
    ("seed", "x"),
    ("temperature", "hot"),
    ("temperature", -1),
    ("top_k", "x"),
    ("thinking_token_budget", 5),
    ("logit_bias", [1]),
    ("logit_bias", {"5000000000": 1}),
    ("logprobs", HUGE),
    ("prompt_logprobs", HUGE),
    ("repetition_detection", {"max_pattern_size": HUGE}),
    ("truncate_prompt_tokens", HUGE),
)


def parameters(folder):
    for path in PATHS:
        for name, value in (*NO_EFFECT, *WRONG_PARAMETERS):
            for stream in (False, True):
                yield path, body_of(path, stream, **{name: value})
    for ids in ([5, 10**6], [-1], [2**63 - 1], [[5], [10**6]], [2**31], [HUGE], [2**70]):
        for stream in (False, True):
            yield "/v1/completions", body_of("/v1/completions", stream, prompt=ids)


def sampling(folder):
    for path in PATHS:
        for name, value in hostile.WRONG_SAMPLING:
            for stream in (False, True):
                yield path, body_of(path, stream, **{name: value})
    for path, wrong in hostile.WRONG_LOGPROBS:
        for stream in (False, True):
            yield f"/v1/{path}", body_of(f"/v1/{path}", stream, **wrong)


def long_list(count):
    extra = asking("confidence_threshold", threshold=[0.5] * count)
    return PATHS[0], body_of(PATHS[0], False, **{XARGS: extra})


def long_lists(folder):
    stops = PATHS[1], body_of(PATHS[1], False, stop=["x"] * 200_000)
    found = [(path, json.dumps(body)) for path, body in (long_list(200_000), stops)]
    return 10 * found


@pytest.fixture(scope="module")
def ordinary(server):
    def ask():
        body = {**body_of(PATHS[1], False), "max_tokens": 32, "return_token_ids": True}
        answer = httpx.post(f"{server.url}{PATHS[1]}", json=body, timeout=60).json()
        return answer["choices"][0]["token_ids"]

    return hostile.same_as_before(ask)


@pytest.mark.parametrize("requests", [policies, parameters, sampling, long_lists])
def test_refused_at_once_and_the_server_goes_on(server, ordinary, requests, tmp_path):
    assert hostile.attack(server.url, requests(tmp_path), ordinary) == []


def test_four_clients_with_long_lists(server, ordinary):
    path, body = long_list(200_000)
    assert hostile.attack_together(server.url, path, body, ordinary, 4) == {413}


@pytest.mark.parametrize("path", PATHS)
def test_what_has_no_effect_is_named_as_the_client_typed_it(server, path):
    hostile.check_named_as_typed(server, body_of, path, NO_EFFECT)


@pytest.mark.parametrize("path", PATHS)
def test_what_asks_for_nothing_is_served(server, path):
    hostile.check_asks_for_nothing(server, body_of, path)


def test_a_body_over_the_limit_is_not_read(server):
    body = body_of(PATHS[1], False, prompt=[5] * 3_000_000)
    hostile.check_size_is_limited(server, PATHS[1], body)


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Sort: ab"}]}
DIALECTS = {
    "/v1/completions": {"model": "tiny", "prompt": "a", "max_tokens": 8},
    "/v1/chat/completions": {**CHAT, "max_tokens": 8},
    "/v1/chat/completions/batch": {**CHAT, "messages": [CHAT["messages"]], "max_tokens": 8},
    "/v1/responses": {"model": "tiny", "input": "Sort: ab", "max_output_tokens": 8},
    "/v1/messages": {**CHAT, "max_tokens": 8},
    "/v1/messages/count_tokens": CHAT,
    "/tokenize": {"model": "tiny", "prompt": "a"},
    "/detokenize": {"model": "tiny", "tokens": [5, 6]},
}
SCHEMA = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
OF_DIALECTS = (
    ("/v1/messages", ("temperature", 101)),
    ("/v1/messages", ("top_p", 0)),
    ("/v1/messages", ("tool_choice", {"type": "any"})),
    ("/v1/messages", ("output_config", {"format": SCHEMA})),
    ("/v1/responses", ("temperature", 101)),
    ("/v1/responses", ("top_p", 0)),
    ("/v1/responses", ("text", {"format": SCHEMA})),
    ("/v1/responses", ("text", {"format": {"type": "json_object"}})),
    ("/v1/responses", ("include", ["message.output_text.logprobs"])),
    ("/v1/responses", ("top_logprobs", 3)),
    ("/v1/responses", ("tool_choice", "required")),
    ("/v1/chat/completions/batch", ("top_p", 0)),
    ("/v1/chat/completions/batch", ("response_format", {"type": "json_object"})),
)


def test_every_path_survives_every_field(server):
    statuses = check_every_path(server.url, DIALECTS, 400)
    assert {path for path, status in statuses if status == 200} <= {
        *DIALECTS,
        "/ping",
        "/is_scaling_elastic_ep",
    }
    assert ("/generative_scoring", 400) in statuses


@pytest.mark.parametrize(("path", "field"), OF_DIALECTS)
def test_fields_of_other_dialects_are_named_as_the_client_typed_them(server, path, field):
    def body_for(path, stream, **fields):
        stream = {} if path.endswith("/batch") else {"stream": stream}
        return {**DIALECTS[path], **stream, **fields}

    hostile.check_named_as_typed(server, body_for, path, [field])


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/v1/messages", "/v1/responses"])
def test_other_dialects_sample_too(server, path):
    """At temperature 2 one of fifty answers to this prompt is the greedy one."""

    def answer(**asked):
        got = httpx.post(f"{server.url}{path}", json={**DIALECTS[path], **asked}, timeout=60)
        assert got.status_code == 200, got.text
        found = got.json()
        for key in ("choices", "content", "output"):
            if key in found:
                return found[key]
        raise AssertionError(found)

    def text(part):
        return json.dumps({k: v for k, v in part.items() if k != "id"})

    def texts(**asked):
        return [text(part) for part in answer(**asked)]

    greedy = texts()
    assert greedy == texts(temperature=0)
    assert any(texts(temperature=2) != greedy for _ in range(5))


def test_a_path_that_is_not_there_and_one_that_is_have_the_same_answer(server):
    def request_for(path):
        return PATHS[0], body_of(PATHS[0], False, **{XARGS: asking("learn2pd", filter=path)})

    hostile.check_paths_are_not_told_apart(server, request_for)


class TestAfterwards(hostile.Afterwards):
    pass
