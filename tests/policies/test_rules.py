"""Each rule, compared with its published form in plain Python for one row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins import L2PDError, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText


def places(selection):
    return [row.nonzero().flatten().tolist() for row in selection]


def test_confidence_threshold_takes_positions_that_reach_it(make_step):
    policy = create_policy("confidence_threshold", threshold=0.5)
    step = make_step([[0.5, 0.49, 0.9, 1.0]], [[True, True, True, False]])
    assert places(policy.select(step, {})) == [[0, 2]]


def test_fixed_schedule_takes_the_k_most_confident(make_step):
    policy = create_policy("fixed_schedule", tokens_per_step=2)
    step = make_step([[0.1, 0.9, 0.8, 0.95]], [[True, True, True, False]])
    state = policy.init_state(1, 4, torch.device("cpu"))
    assert places(policy.select(step, state)) == [[1, 2]]


def num_transfer_tokens(masks: int, steps: int) -> list[int]:
    """LLaDA's number of tokens for each step; the first steps get the remainder."""
    return [masks // steps + (1 if i < masks % steps else 0) for i in range(steps)]


@given(masks=st.integers(1, 32), steps=st.integers(1, 32), blocks=st.integers(1, 4))
def test_fixed_schedule_uses_the_steps_as_llada_does(make_step, masks, steps, blocks):
    policy = create_policy("fixed_schedule", steps=steps * blocks)
    state = policy.init_state(1, 32, torch.device("cpu"))
    masked = [i < masks for i in range(32)]
    for index, wanted in enumerate(num_transfer_tokens(masks, steps)):
        step = make_step(
            [[0.5] * 32],
            [masked],
            step_index=index,
            block_index=blocks - 1,
            canvas_length=32 * blocks,
        )
        chosen = places(policy.select(step, state))[0]
        assert len(chosen) == wanted
        for place in chosen:
            masked[place] = False


@given(steps=st.integers(1, 64), blocks=st.integers(1, 8))
def test_fixed_schedule_spreads_any_number_of_steps_over_the_blocks(make_step, steps, blocks):
    policy = create_policy("fixed_schedule", steps=steps)
    taken = 0
    for block in range(blocks):
        masked, index = [True] * 8, 0
        state = policy.init_state(1, 8, torch.device("cpu"))
        while any(masked):
            step = make_step(
                [[0.5] * 8], [masked], step_index=index, block_index=block, canvas_length=8 * blocks
            )
            chosen = places(policy.select(step, state))[0] or [masked.index(True)]
            for place in chosen:
                masked[place] = False
            index += 1
        taken += index
    assert taken == max(blocks, min(steps, taken))
    if blocks <= steps <= 8 * blocks and steps % blocks == 0:
        assert taken == steps


def test_as_many_steps_as_tokens_are_one_token_per_step_in_a_short_last_block(make_step):
    policy = create_policy("fixed_schedule", steps=40)
    for block, present in ((0, 32), (1, 8)):
        masked = [[i < present for i in range(32)]]
        state = policy.init_state(1, 32, torch.device("cpu"))
        step = make_step([[0.5] * 32], masked, block_index=block, canvas_length=40)
        assert len(places(policy.select(step, state))[0]) == 1


def test_fixed_schedule_refuses_two_schedules():
    with pytest.raises(L2PDError, match=r"steps=4 and tokens_per_step=2"):
        create_policy("fixed_schedule", steps=4, tokens_per_step=2)


def test_oracle_takes_predictions_that_equal_the_reference(make_step):
    policy = create_policy("oracle")
    step = make_step(
        [[0.1] * 4], [[True, True, True, False]], x0=[[5, 6, 7, 8]], reference=[[5, 0, 7, 8]]
    )
    assert places(policy.select(step, {})) == [[0, 2]]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("confidence_threshold", {"threshold": 1.5}, ["threshold", "1.5", "a number up to 1"]),
        ("confidence_threshold", {"threshold": "0.9"}, ["threshold", "'0.9'", "number"]),
        ("confidence_threshold", {"threshold": True}, ["threshold", "True", "number"]),
        ("confidence_threshold", {"treshold": 0.9}, ["treshold", "0.9", "threshold"]),
        ("fixed_schedule", {"steps": 0}, ["steps", "0", "a number from 1"]),
        ("fixed_schedule", {"tokens_per_step": 1.5}, ["tokens_per_step", "1.5", "a whole number"]),
        ("learn2pd", {"threshold": 0.0}, ["threshold", "0.0", "a number above 0"]),
        (
            "learn2pd",
            {"filter": "/no/such/folder"},
            ["/no/such/folder", "neither an existing folder nor a hub id"],
        ),
        ("oracle", {"reference": "abc"}, ["reference", "abc"]),
    ],
)
def test_wrong_options_are_named_with_value_and_choices(name, options, words):
    with pytest.raises(L2PDError) as caught:
        create_policy(name, **options)
    for word in words:
        assert word in str(caught.value)


def test_descriptions_name_policy_and_options():
    assert create_policy("confidence-threshold").describe() == "confidence_threshold(threshold=0.9)"
    assert create_policy("fixed_schedule").describe() == "fixed_schedule(tokens_per_step=1)"
    assert create_policy("oracle", reference=[1, 2]).describe() == "oracle()"


def test_credit_takes_nothing_if_every_prediction_loses_to_one_with_credit():
    batch = BlockBatch.start(torch.full((1, 5), 3), [create_policy("credit")], mask_token_id=3)
    sure = torch.arange(1.0, 2.0, 0.2).view(1, 5, 1)
    before = torch.tensor([1.0, 0.9, 0.0, 0.0]) * sure
    for _ in range(2):
        denoising_step(batch, before, end_of_text=EndOfText("off", ()))
    waiting = batch.masked
    # Token 1 is likelier now, but not with the credit of token 0 added: progress commits one.
    outcome = denoising_step(batch, before[..., [1, 0, 2, 3]], end_of_text=EndOfText("off", ()))
    assert outcome.step.x0[waiting].tolist() == [1, 1, 1]
    assert int(outcome.committed.sum()) == 1
