"""SGLang's requests and blocks on the host, and what requests may ask for, without SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_adapters.sglang.refusals import (
    check_effects,
    check_ids,
    check_input,
    check_rest,
    check_typed,
    refusal,
)
from l2pd_adapters.sglang.requests import BlockRow, RequestState
from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins import ModelContext, create_policy
from l2pd_plugins.block_layout import BlockLayout
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.errors import L2PDError

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
    fields = {"custom_params": None, "ignore_eos": False, "top_k": -1, "temperature": 1.0}
    return SimpleNamespace(**fields | changes)


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
    request = SimpleNamespace(rid="r", sampling_params=params(ignore_eos=True))
    state = RequestState.of(request, server)
    assert (state.policy.threshold, state.ignores_end, state.seed) == (0.5, True, "r")
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
    [{}, {"n": 1, "temperature": 0}, {"temperature": 0.7}, {"json_schema": ""}, {"min_p": 0.0}],
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
        ("temperature", 0.5),
        ("min_p", 0.1),
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
    request = SimpleNamespace(sampling_params=params(**{name: value}), origin_input_ids=[1])
    assert (refusal(request, server) or "").startswith(f"{name}=")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"origin_input_ids": [1, VOCABULARY]}, "input_ids: 40 is no token; expected 0 to 39"),
        ({"origin_input_ids": [-1]}, "input_ids: -1 is no token"),
        ({"sampling_params": params(ignore_eos="yes")}, "ignore_eos='yes': expected true or false"),
        ({"sampling_params": params(temperature=0.5, top_k=1)}, None),  # SGLang's temperature 0
        ({"return_logprob": True}, "return_logprob=True: has no effect"),
        ({"top_logprobs_num": [0, 0]}, None),
        ({"top_logprobs_num": [0, 2]}, "top_logprobs_num=[0, 2]: has no effect"),
    ],
)
def test_the_scheduler_refuses_unchecked_requests(
    server: SglangServer, changes: dict[str, Any], said: str | None
) -> None:
    fields = {"sampling_params": params(), "origin_input_ids": [1, 2]} | changes
    found = refusal(SimpleNamespace(**fields), server)
    assert found is None if said is None else (found or "").startswith(said)


@pytest.mark.parametrize("ids", [[], [0, 39], [[1], [2, 3]], [[]]])
def test_tokens_of_the_vocabulary_are_accepted(ids: list) -> None:
    check_ids(ids, VOCABULARY)


@pytest.mark.parametrize("ids", [[1.0], [True], ["1"], [[1], "x"], [[1], [40]], [[1], 2]])
def test_ids_outside_the_vocabulary_are_refused(ids: list) -> None:
    with pytest.raises(L2PDError, match=r"^input_ids"):
        check_ids(ids, VOCABULARY)


def test_a_request_that_asks_for_log_probabilities_is_refused() -> None:
    check_rest(SimpleNamespace(return_logprob=[False, False]))
    with pytest.raises(L2PDError, match=r"^return_logprob=\[False, True\]"):
        check_rest(SimpleNamespace(return_logprob=[False, True]))


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
        {"text": ["a", "b"], "return_logprob": [False, False], "top_logprobs_num": [0, 0]},
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
        ("return_logprob", [False, True]),
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
        ("chat", {"vllm_xargs": {"decoding_plugin": "klass"}}, "vllm_xargs"),
        ("completions", {"logprobs": 0}, "logprobs"),
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


def test_the_scheduler_does_not_judge_what_sglang_has_normalised(server: SglangServer) -> None:
    for name, value in (("top_p", 0.9), ("top_k", 5)):
        with pytest.raises(L2PDError, match=f"^{name}="):
            check_effects({name: value}, server)
        request = SimpleNamespace(sampling_params=params(**{name: value}), origin_input_ids=[1])
        assert refusal(request, server) is None
