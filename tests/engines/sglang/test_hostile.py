"""Hostile requests on a real server: each is refused, and the server keeps answering."""

import httpx
import pytest

from tests.engines import hostile
from tests.engines.hostile import BAD_NAMES, DEEP, HUGE, LONG, NO_EFFECT_OPENAI, PROMPT, STRICT_TOOL
from tests.engines.sglang.server import Server

OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions")
PATHS = ("/generate", *OPENAI_PATHS)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with hostile.strangers_welcome(Server(tmp_path_factory.mktemp("server"))) as running:
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


def long_list(folder):
    """A list that is as long as SGLang's own parsing, which comes before our checks, allows."""
    params = {"unmask_policy": "confidence_threshold", "threshold": [0.5] * 200_000}
    yield "/generate", body_of("/generate", False, custom_params=params)


@pytest.fixture(scope="module")
def ordinary(server):
    def ask():
        body = body_of("/generate", False, max_new_tokens=32)
        return httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["output_ids"]

    return hostile.same_as_before(ask)


@pytest.mark.parametrize("requests", [policies, parameters, sampling, long_list])
def test_refused_at_once_and_the_server_goes_on(server, ordinary, requests, tmp_path):
    assert hostile.attack(server.url, requests(tmp_path), ordinary) == []


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


def test_a_path_that_is_not_there_and_one_that_is_have_the_same_answer(server):
    def request_for(path):
        params = {"unmask_policy": "learn2pd", "filter": path}
        return "/generate", body_of("/generate", False, custom_params=params)

    hostile.check_paths_are_not_told_apart(server, request_for)


class TestAfterwards(hostile.Afterwards):
    pass
