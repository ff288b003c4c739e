"""SGLang's requests and blocks on the host, and what requests may ask for, without SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_adapters.request_sampling import ASKED, seed_of
from l2pd_adapters.sglang.refusals import (
    check_effects,
    check_ids,
    check_input,
    check_typed,
    refusal,
)
from l2pd_adapters.sglang.requests import BlockRow, RequestState
from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins import ModelContext, create_policy
from l2pd_plugins.block_layout import BlockLayout
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.sampling import Sampling

VOCABULARY, MASK, EOT, BLOCK = 40, 39, 38, 8


@pytest.fixture(scope="module")
def server() -> SglangServer:
    return SglangServer.at_launch(
        "confidence_threshold",
        {"threshold": 0.5},
        end_tokens=(EOT,),
        model=ModelContext("m", BLOCK, MASK, VOCABULARY),
        canvas=64,
        sampling_defaults={"temperature": 0.7},
    )


def params(**changes: Any) -> SimpleNamespace:
    fields = {"custom_params": None, "ignore_eos": False, "top_k": 1 << 30, "temperature": 1.0}
    return SimpleNamespace(**{"top_p": 1.0, "min_p": 0.0, "sampling_seed": None} | fields | changes)


def scheduled(**changes: Any) -> SimpleNamespace:
    """SGLang's Req."""
    fields = {"rid": "r", "sampling_params": params(), "origin_input_ids": [1, 2]}
    logprob = SimpleNamespace(top_logprobs_num=0, token_ids_logprob=None)
    return SimpleNamespace(**fields | {"return_logprob": False, "logprob": logprob} | changes)


def row_of(
    request: RequestState, prompt: int, new: int, offset: int, start: int = 0, length: int = BLOCK
) -> BlockRow:
    return BlockRow(
        request=request,
        prompt_length=prompt,
        max_new_tokens=new,
        offset=offset,
        start=start,
        tokens=[1] * start + [MASK] * (length - start),
        mask_token_id=MASK,
    )


@given(
    prompt=st.integers(0, 40), new=st.integers(0, 40), length=st.integers(1, 9), at=st.integers(0)
)
def test_a_block_has_the_place_of_the_layout(prompt: int, new: int, length: int, at: int) -> None:
    layout = BlockLayout.of("block_causal", prompt, max(new, 1), length)
    number = at % layout.blocks
    state = RequestState(create_policy("fixed_schedule"))
    row = row_of(state, prompt, new, layout.start_of(number), length=length)
    assert (row.block_index, row.canvas_length) == (number, layout.canvas_length)


@pytest.mark.parametrize("offset", [0, 8, 16])
def test_a_reference_is_shown_at_the_positions_of_its_tokens(offset: int) -> None:
    """The answer begins at 5, in the first block, and has 10 tokens."""
    state = RequestState(create_policy("oracle", reference=list(range(10, 20))))
    shown = row_of(state, 5, 10, offset).reference(filler=EOT)
    whole = [EOT] * 5 + list(range(10, 20)) + [EOT] * 20
    assert shown == whole[offset : offset + BLOCK]


def test_a_policy_without_a_reference_gets_the_filler() -> None:
    state = RequestState(create_policy("fixed_schedule"))
    assert row_of(state, 5, 10, 0).reference(filler=7) == [7] * BLOCK


def test_a_row_records_when_each_token_was_committed() -> None:
    state = RequestState(create_policy("fixed_schedule"), steps=3, nfe=4)
    row = row_of(state, 2, 20, 0, start=2, length=5)
    assert row.masked
    assert row.needed == [False, False, True, True, True]
    row.step([1, 1, MASK, 5, 6], [False, False, True, False, False])
    assert row.masked
    row.step([1, 1, 4, 5, MASK], [False, False, False, False, True])  # masked again
    row.step([1, 1, 4, 9, 6], [False] * 5)  # edited
    assert not row.masked
    row.finish()
    row.finish()  # once
    assert state.step_map == [4, 5, 5]
    assert (state.steps, state.nfe) == (6, 8)  # one more pass, which writes the final keys
    assert state.nfe_map == [8] * 3


def test_a_block_of_the_prompt_is_not_counted() -> None:
    state = RequestState(create_policy("fixed_schedule"))
    row = row_of(state, 16, 8, 0, start=BLOCK)
    assert not row.masked
    row.finish()
    assert (state.nfe, state.step_map, state.nfe_map) == (0, [], [])


def test_carried_state_stays_with_the_request() -> None:
    class Carrying(type(create_policy("fixed_schedule"))):  # type: ignore[misc]
        carries = frozenset({"n"})

        def init_state(self, batch_size, block_length, device):
            return {"n": torch.arange(batch_size) + 5}

    state = RequestState(Carrying())
    batch = BlockBatch.start(torch.full((2, BLOCK), MASK), [state.policy] * 2, mask_token_id=MASK)
    row = row_of(state, 0, 8, 0)
    row.place = batch, 1
    row.finish()
    assert {name: value.tolist() for name, value in state.carried.items()} == {"n": [6]}


def test_random_numbers_follow_from_seed_and_place() -> None:
    device = torch.device("cpu")

    def drawn(seed: str, offset: int) -> float:
        state = RequestState(create_policy("fixed_schedule"), seed=seed)
        generator = row_of(state, 0, 8, offset).generator(device)
        return torch.rand(1, generator=generator).item()

    assert drawn("a", 8) == drawn("a", 8)
    assert len({drawn("a", 8), drawn("a", 16), drawn("b", 8)}) == 3


def test_a_request_chooses_its_policy(server: SglangServer) -> None:
    request = scheduled(sampling_params=params(ignore_eos=True))
    state = RequestState.of(request, server)
    assert (state.policy.threshold, state.ignores_end, state.seed) == (0.5, True, "r")
    assert (state.sampling, state.top) == (None, -1)
    request.sampling_params = params(
        custom_params={"unmask_policy": "fixed_schedule", "tokens_per_step": 2, "__theirs": 1},
        sampling_seed=7,
    )
    state = RequestState.of(request, server)
    assert (state.policy.tokens_per_step, state.seed) == (2, "7")


@pytest.mark.parametrize(
    "custom", ["s", [1], 5, {"unmask_policy": "no_such"}, {"threshold": 7}, {"no_such": 1}]
)
def test_wrong_custom_params_are_refused(server: SglangServer, custom: Any) -> None:
    with pytest.raises(L2PDError):
        server.choose(custom)


@pytest.mark.parametrize(
    "granted",
    [{}, {"n": 1}, {"repetition_penalty": 1.0}, {"json_schema": ""}, {"temperature": 0.3}],
)
def test_parameters_at_their_defaults_are_accepted(
    server: SglangServer, granted: dict[str, Any]
) -> None:
    check_effects(granted, server)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("beam_width", 2),
        ("min_new_tokens", 1),
        ("frequency_penalty", 0.1),
        ("presence_penalty", 0.1),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"1": 2}),
        ("json_schema", "{}"),
        ("regex", "a"),
        ("ebnf", "a"),
        ("structural_tag", "a"),
        ("stop_regex", "a"),
    ],
)
def test_parameters_without_effect_are_refused_by_name(
    server: SglangServer, name: str, value: Any
) -> None:
    with pytest.raises(L2PDError, match=f"^{name}="):
        check_effects({name: value}, server)
    request = scheduled(sampling_params=params(**{name: value}))
    assert (refusal(request, server) or "").startswith(f"{name}=")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"origin_input_ids": [1, VOCABULARY]}, "input_ids: 40 is no token; expected 0 to 39"),
        ({"origin_input_ids": [-1]}, "input_ids: -1 is no token"),
        ({"sampling_params": params(ignore_eos="yes")}, "ignore_eos='yes': expected true or false"),
        ({"sampling_params": params(temperature=0.5, top_k=1)}, None),  # SGLang's temperature 0
        ({"return_logprob": True}, None),
        ({"return_logprob": [True]}, "return_logprob=[True]: expected true or false"),
        ({"logprob": SimpleNamespace(top_logprobs_num=21)}, "top_logprobs_num=21: expected 0 to"),
        (
            {"logprob": SimpleNamespace(top_logprobs_num=0, token_ids_logprob=[1])},
            "token_ids_logprob=[1]: has no effect",
        ),
        ({"return_flat_raw_top_logprobs": True}, "return_flat_raw_top_logprobs=True"),
        ({"sampling_params": params(temperature=float("inf"))}, "temperature=inf"),
        ({"sampling_params": params(temperature=1e-4)}, "temperature=0.0001"),
        ({"sampling_params": params(sampling_seed=1 << 63)}, "sampling_seed="),
    ],
)
def test_the_scheduler_refuses_unchecked_requests(
    server: SglangServer, changes: dict[str, Any], said: str | None
) -> None:
    found = refusal(scheduled(**changes), server)
    assert found is None if said is None else (found or "").startswith(said)


@pytest.mark.parametrize("ids", [[], [0, 39], [[1], [2, 3]], [[]]])
def test_tokens_of_the_vocabulary_are_accepted(ids: list) -> None:
    check_ids(ids, VOCABULARY)


@pytest.mark.parametrize("ids", [[1.0], [True], ["1"], [[1], "x"], [[1], [40]], [[1], 2]])
def test_ids_outside_the_vocabulary_are_refused(ids: list) -> None:
    with pytest.raises(L2PDError, match=r"^input_ids"):
        check_ids(ids, VOCABULARY)


@pytest.mark.parametrize(
    ("changes", "sampling"),
    [
        ({"top_k": 1}, None),  # SGLang's temperature 0
        ({"temperature": 0.7}, None),  # the checkpoint's own
        ({"temperature": 0.5}, Sampling(seed_of("r"), 0.5)),
        ({"sampling_seed": 5}, Sampling(5)),
        ({"custom_params": {ASKED: True}}, Sampling(seed_of("r"))),
        ({"temperature": 0.7, "custom_params": {ASKED: True}}, Sampling(seed_of("r"), 0.7)),
        ({"top_k": 5, "top_p": 0.9}, Sampling(seed_of("r"), 1.0, 5, 0.9)),
        ({"min_p": 0.25, "top_k": VOCABULARY}, Sampling(seed_of("r"), min_p=0.25)),
    ],
)
def test_a_request_samples_if_the_client_says_so(
    server: SglangServer, changes: dict[str, Any], sampling: Sampling | None
) -> None:
    assert (
        RequestState.of(scheduled(sampling_params=params(**changes)), server).sampling == sampling
    )


def test_a_request_may_want_log_probabilities(server: SglangServer) -> None:
    state = RequestState.of(scheduled(return_logprob=True), server)
    assert (state.top, list(state.told(True))) == (
        0,
        ["step_map", "nfe", "l2pd_log_probabilities"],
    )
    logprob = SimpleNamespace(top_logprobs_num=3, token_ids_logprob=None)
    state = RequestState.of(
        scheduled(return_logprob=True, logprob=logprob, sampling_params=params(top_p=0.5)), server
    )
    assert (state.top, list(state.told(False))) == (
        3,
        ["step_map", "nfe", "seed", "l2pd_log_probabilities", "l2pd_top"],
    )


@dataclass
class Input:
    """As far as the checks know SGLang's GenerateReqInput."""

    text: Any = None
    input_ids: Any = None
    rid: Any = None
    sampling_params: Any = None
    image_data: Any = None
    return_logprob: Any = None
    top_logprobs_num: Any = None
    logprob_start_len: Any = None
    lora_path: Any = None
    lora_id: Any = None
    session_params: Any = None
    positional_embed_overrides: Any = None
    return_entropy: bool = False
    routed_experts_start_len: int = 0


@pytest.mark.parametrize(
    "granted",
    [
        {"text": "a"},
        {"text": "a", "rid": "r", "lora_path": "adapter"},
        {"text": ["a", "b"], "rid": ["r", "s"]},
        {"input_ids": [[1], [2]], "rid": ["r", "s"]},
        {"input_ids": [1, 2], "image_data": [], "top_logprobs_num": 0, "return_logprob": False},
        {"text": ["a", "b"], "return_logprob": [False, True], "top_logprobs_num": [0, 20]},
        {"text": "a", "return_logprob": True, "top_logprobs_num": 5, "logprob_start_len": -1},
    ],
)
def test_an_ordinary_input_is_granted(granted: dict[str, Any]) -> None:
    check_input(Input(**granted))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rid", ["r"]),
        ("rid", []),
        ("sampling_params", []),
        ("image_data", "x"),
        ("return_logprob", [True]),
        ("return_logprob", 2),
        ("top_logprobs_num", 21),
        ("top_logprobs_num", -1),
        ("top_logprobs_num", True),
        ("top_logprobs_num", 1 << 70),
        ("top_logprobs_num", [1]),
        ("lora_id", ["x"]),
        ("lora_id", []),
        ("session_params", {}),
        ("session_params", {"id": "x"}),
        ("positional_embed_overrides", 5),
        ("return_entropy", True),
        ("routed_experts_start_len", 3),
    ],
)
def test_what_could_end_the_scheduler_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(L2PDError, match=f"^{name}="):
        check_input(Input(**{"text": "a", name: value}))


@pytest.mark.parametrize("rid", [["r", 5], [], [None]])
def test_a_batch_needs_a_text_for_each_id(rid: list) -> None:
    with pytest.raises(L2PDError, match=r"^rid="):
        check_input(Input(text=["a", "b"], rid=rid))


@pytest.mark.parametrize(
    ("endpoint", "body", "name"),
    [
        ("chat", {"custom_params": {"unmask_policy": "klass"}, "tools": [{}], "echo": False}, ""),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"max_completion_tokens": -1}, "max_completion_tokens"),
        ("chat", {"echo": True}, "echo"),
        ("chat", {"logprobs": 0}, ""),
        ("chat", {"logprobs": True, "top_logprobs": 20, "temperature": 0.7, "top_k": 5}, ""),
        ("chat", {"logprobs": 2}, "logprobs"),
        ("chat", {"top_logprobs": 2}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"logprobs": True, "return_logprob": True}, "return_logprob"),
        ("chat", {"temperature": -1}, "temperature"),
        ("chat", {"top_k": 1 << 63}, "top_k"),
        ("completions", {"top_logprobs": 2}, "top_logprobs"),
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"logprobs": 0, "echo": True}, "echo"),
        ("completions", {"temperature": 1e-30}, "temperature"),
        ("generate", {"return_logprob": True, "top_logprobs_num": 3}, ""),
        ("generate", {"logprobs": True}, "logprobs"),
        ("chat", {"vllm_xargs": {"decoding_plugin": "klass"}}, "vllm_xargs"),
        ("completions", {"logprobs": 0}, ""),
        ("completions", {"echo": True, "custom_params": {"unmask_policy": "klass"}}, ""),
        ("completions", {"tools": [{}]}, "tools"),
        ("generate", {"temperature": 0.5}, "temperature"),
        ("generate", {"max_tokens": 5}, "max_tokens"),
        ("generate", {"ignore_eos": True}, "ignore_eos"),
        ("generate", {"custom_params": {"unmask_policy": "klass"}}, "custom_params"),
        ("generate", {"sampling_params": {"max_new_tokens": 5}, "stream": True}, ""),
    ],
)
def test_fields_are_judged_by_their_endpoint(
    server: SglangServer, endpoint: Any, body: dict[str, Any], name: str
) -> None:
    if not name:
        check_typed(body, endpoint, server)
        return
    with pytest.raises(L2PDError, match=f"^{name}="):
        check_typed(body, endpoint, server)


def test_a_completion_template_has_a_place_for_a_suffix(server: SglangServer) -> None:
    check_typed({"suffix": "x"}, "completions", server, honoured=["suffix"])
    with pytest.raises(L2PDError, match=r"^suffix="):
        check_typed({"suffix": "x"}, "completions", server)
