"""Hostile requests on a real server: each is refused, and the server keeps answering."""

import json

import httpx
import pytest
import zstandard

from tests.engines import hostile
from tests.engines.every_path import check_every_path
from tests.engines.hostile import BAD_NAMES, DEEP, HUGE, LONG, NO_EFFECT_OPENAI, PROMPT, STRICT_TOOL
from tests.engines.sglang.server import Server

OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions")
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Sort: ab"}]}
PATHS = ("/generate", *OPENAI_PATHS)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    launched = Server(tmp_path_factory.mktemp("server"))
    launched.variables["SGLANG_ENABLE_REQUEST_DECOMPRESSION"] = "1"
    with hostile.strangers_welcome(launched) as running:
        yield running


def body_of(path, stream, **params):
    """A request that would be served, with these sampling parameters."""
    if path == "/generate":
        return {
            "text": PROMPT,
            "sampling_params": {"max_new_tokens": 8, **params},
            "stream": stream,
        }
    return hostile.completion_body(path, stream, model="default", **params)


def policies(folder):
    turns = hostile.alternating(PATHS)
    for name, options in hostile.bad_options(folder):
        path, stream = next(turns)
        yield path, body_of(path, stream, custom_params={"unmask_policy": name, **options})
    for name in BAD_NAMES:
        path, stream = next(turns)
        yield path, body_of(path, stream, custom_params={"unmask_policy": name})
    for name in (5, True, ["oracle"], DEEP):
        yield "/generate", body_of("/generate", stream, custom_params={"unmask_policy": name})
    for custom_params in (
        "s",
        5,
        [1],
        [[]],
        True,
        DEEP,
        {LONG: 1},
        {f"a{i}": 1 for i in range(99)},
    ):
        for path in PATHS:
            yield path, body_of(path, False, custom_params=custom_params)


NO_EFFECT = (
    ("n", 2),
    ("min_new_tokens", 3),
    ("frequency_penalty", 0.5),
    ("presence_penalty", 0.5),
    ("repetition_penalty", 1.5),
    ("logit_bias", {"5": 1.0}),
    ("json_schema", "{}"),
    ("regex", "a*"),
    ("ebnf", 'root ::= "a"'),
    ("structural_tag", "{}"),
    ("beam_width", 2),
    ("stop_regex", "^(a|b|ab|[a-z])*x"),
    ("stop_regex", "("),
)
OF_A_REQUEST = (
    ("return_logprob", [True]),
    ("return_logprob", 5),
    ("return_logprob", "x"),
    ("top_logprobs_num", 21),
    ("top_logprobs_num", 2**70),
    ("top_logprobs_num", [1]),
    ("top_logprobs_num", -1),
    ("logprob_start_len", "x"),
    ("token_ids_logprob", [1]),
    ("custom_logit_processor", "x"),
    ("return_sampling_mask", True),
    ("return_hidden_states", True),
    ("return_flat_raw_output_top_logprobs", True),
    ("return_entropy", True),
    ("session_params", {"id": "x"}),  # SGLang would never answer
    ("positional_embed_overrides", 5),  # the scheduler would end
    ("lora_id", ["x"]),  # ... would end
    ("lora_id", []),  # ... would hang
    ("image_data", "x"),
    ("input_embeds", [[0.1]]),
    ("http_worker_ipc", "ipc:///nowhere"),
    ("bootstrap_room", 5),
    ("rid", ["x"]),
    ("rid", []),
    ("sampling_params", []),
    ("max_new_tokens", 5),
    ("temperature", 0.7),
)
OF_OPENAI = (
    *NO_EFFECT_OPENAI,
    ("tools", [STRICT_TOOL]),
    ("watermark", {"enabled": True}),
    ("custom_logit_processor", "x"),
    ("return_hidden_states", True),
    ("session_params", {"id": "x"}),
    ("vllm_xargs", {"decoding_plugin": "klass"}),
    ("decoding_plugin", "klass"),
)
WRONG_PARAMETERS = (
    ("ignore_eos", "yes"),
    ("max_new_tokens", "x"),
    ("max_new_tokens", -1),
    ("max_new_tokens", [HUGE]),
    ("stop", 5),
    ("stop_token_ids", [2**70]),
    ("stop_token_ids", ["x"]),
    ("sampling_seed", 2**70),
    ("sampling_seed", "x"),
    ("temperature", "hot"),
    ("no_such_parameter", 1),
    ("skip_special_tokens", 5),
    ("logit_bias", [1]),
)


def parameters(folder):
    for name, value in (*NO_EFFECT, *WRONG_PARAMETERS):
        for stream in (False, True):
            yield "/generate", body_of("/generate", stream, **{name: value})
    for name, value in OF_A_REQUEST:
        for stream in (False, True):
            yield "/generate", {**body_of("/generate", stream), name: value}
    for path in OPENAI_PATHS:
        for stream in (False, True):
            for value in (0, -1, HUGE):
                yield path, {**body_of(path, stream), "max_tokens": value}
    for sampling_params in ("s", 5, [5], ["s"]):
        yield "/generate", {"text": PROMPT, "sampling_params": sampling_params}
    for ids in ([5, 10**6], [-1], [2**63 - 1], [[5], [10**6]], [2**31]):
        yield "/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 8}}


def sampling(folder):
    for name, value in hostile.WRONG_SAMPLING:
        for stream in (False, True):
            theirs = {"seed": "sampling_seed"}.get(name, name)
            yield "/generate", body_of("/generate", stream, **{theirs: value})
            for path in OPENAI_PATHS:
                yield path, {**body_of(path, stream), name: value}
    for path, wrong in hostile.WRONG_LOGPROBS:
        for stream in (False, True):
            yield f"/v1/{path}", {**body_of(f"/v1/{path}", stream), **wrong}


def long_list(count):
    params = {"unmask_policy": "confidence_threshold", "threshold": [0.5] * count}
    return "/generate", body_of("/generate", False, custom_params=params)


def long_lists(folder):
    found = [long_list(200_000), ("/generate", {"text": "x" * 4_000_000})]
    found += [("/v1/tokenize", {"prompt": "x" * 4_000_000})]
    found += [("/tokenize", {"prompt": ["x" * 1_000] * 4_000})]
    many = {"messages": [{"role": "user", "content": "a"}] * 20_000, "model": "default"}
    found += [("/v1/chat/completions", many), ("/v1/messages", {**many, "max_tokens": 8})]
    found += [("/v1/messages/count_tokens", many)]
    return 5 * [(path, json.dumps(body)) for path, body in found]


@pytest.fixture(scope="module")
def ordinary(server):
    def ask():
        body = body_of("/generate", False, max_new_tokens=32)
        return httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["output_ids"]

    return hostile.same_as_before(ask)


@pytest.mark.parametrize("requests", [policies, parameters, sampling, long_lists])
def test_refused_at_once_and_the_server_goes_on(server, ordinary, requests, tmp_path):
    assert hostile.attack(server.url, requests(tmp_path), ordinary) == []


def test_four_clients_with_long_lists(server, ordinary):
    path, body = long_list(200_000)
    assert hostile.attack_together(server.url, path, body, ordinary, 4) == {413}


@pytest.mark.parametrize("name", [name for name, _ in NO_EFFECT])
def test_what_has_no_effect_is_named(server, name):
    value = dict(NO_EFFECT)[name]
    answer = httpx.post(
        f"{server.url}/generate", json=body_of("/generate", True, **{name: value}), timeout=60
    )
    assert answer.status_code == 400
    assert f"{name}=" in answer.text


@pytest.mark.parametrize("path", OPENAI_PATHS)
def test_what_has_no_effect_is_named_as_the_client_typed_it(server, path):
    hostile.check_named_as_typed(server, body_of, path, OF_OPENAI)


@pytest.mark.parametrize("path", OPENAI_PATHS)
def test_what_asks_for_nothing_is_served(server, path):
    hostile.check_asks_for_nothing(server, body_of, path)


@pytest.mark.parametrize(("path", "name"), [("/generate", "input_ids"), (PATHS[2], "prompt")])
def test_a_body_over_the_limit_is_not_read(server, path, name):
    hostile.check_size_is_limited(server, path, {name: [5] * 3_000_000})


DIALECTS = {
    "/generate": {"text": PROMPT, "sampling_params": {"max_new_tokens": 8}},
    "/v1/completions": {"model": "default", "prompt": PROMPT, "max_tokens": 8},
    "/v1/chat/completions": {**CHAT, "max_tokens": 8},
    "/invocations": {**CHAT, "max_tokens": 8},
    "/v1/messages": {**CHAT, "max_tokens": 8},
    "/v1/messages/count_tokens": CHAT,
    "/v1/tokenize": {"model": "default", "prompt": "a"},
    "/v1/detokenize": {"model": "default", "tokens": [5, 6]},
}
OF_MESSAGES = (
    ("temperature", 0.5),
    ("top_p", 0.5),
    ("top_k", 5),
    ("tool_choice", {"type": "any"}),
    ("output_config", {"format": {"type": "json_schema", "schema": {"type": "object"}}}),
)


def test_every_path_survives_every_field(server):
    statuses = check_every_path(server.url, DIALECTS, 400)
    assert ("/flush_cache", 403) in statuses
    assert ("/v1/score", 400) in statuses
    assert {path for path, status in statuses if status == 200} <= DIALECTS.keys()


def test_anthropics_fields_are_named_as_the_client_typed_them(server):
    def body_for(path, stream, **fields):
        return {**DIALECTS[path], "stream": stream, **fields}

    hostile.check_named_as_typed(server, body_for, "/v1/messages", OF_MESSAGES)


def ask_compressed(server, content, method="zstd"):
    headers = {"content-type": "application/json", "x-body-compressed": method}
    return httpx.post(f"{server.url}/generate", content=content, headers=headers, timeout=60)


def test_a_compressed_body_is_served(server, ordinary):
    body = zstandard.compress(json.dumps(body_of("/generate", False)).encode())
    assert ask_compressed(server, body).status_code == 200


@pytest.mark.parametrize(
    ("content", "method", "status", "said"),
    [
        (zstandard.compress(b" " * (200 << 20)), "zstd", 413, "request_body_mib=4"),
        (zstandard.compress(b"[" + b"0," * 100_000), "zstd", 413, "request_body_values="),
        (b"{}", "zstd", 400, "cannot be decompressed"),
        (b"{}", "gzip", 400, "x-body-compressed='gzip'"),
    ],
)
def test_the_limits_hold_for_a_decompressed_body(server, content, method, status, said):
    assert len(content) < 1 << 20
    answer = ask_compressed(server, content, method)
    assert (answer.status_code, said in answer.text) == (status, True)


def test_a_path_that_is_not_there_and_one_that_is_have_the_same_answer(server):
    def request_for(path):
        params = {"unmask_policy": "learn2pd", "filter": path}
        return "/generate", body_of("/generate", False, custom_params=params)

    hostile.check_paths_are_not_told_apart(server, request_for)


class TestAfterwards(hostile.Afterwards):
    pass
