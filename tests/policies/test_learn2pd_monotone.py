"""`learn2pd(variant=monotone)`: its filter, and which filters the variant accepts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins import L2PDError, ModelContext, create_policy
from l2pd_policies.learn2pd import MonotoneFilter, UnmaskFilter
from tests.policies.recorded_steps import recorded


def filter_of(seed, scale=1.0):
    torch.manual_seed(seed)
    made = MonotoneFilter(threshold=0.5, base_model="m")
    for weight in made.parameters():
        weight.data = torch.randn_like(weight) * scale
    return made.eval().requires_grad_(False)


def random_block(seed, rows=1, length=8):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(rows, length, generator=generator) ** 0.3
    masked = torch.rand(rows, length, generator=generator) > 0.3
    return torch.stack((confidence, masked.float()), dim=-1)


@given(
    seed=st.integers(0, 2**20),
    position=st.integers(0, 7),
    lower=st.floats(0, 1, width=32),
    higher=st.floats(0, 1, width=32),
)
def test_a_logit_never_falls_if_the_own_confidence_rises(seed, position, lower, higher):
    lower, higher = sorted((lower, higher))
    made, inputs = filter_of(seed), random_block(seed).repeat(2, 1, 1)
    inputs[:, position, 0] = torch.tensor([lower, higher])
    before, after = made(inputs)[:, position].tolist()
    assert after >= before - 1e-4 * max(1, abs(before))


def test_the_own_confidence_and_that_of_surer_positions_count():
    made, inputs = filter_of(0), torch.tensor([[[0.6, 1.0], [0.7, 1.0], [0.2, 1.0], [0.9, 0.0]]])
    base = made(inputs)[0]
    rises = inputs.clone()
    rises[0, 0, 0] = 0.69
    assert made(rises)[0, 0] > base[0]
    # A committed position adds no doubt, however sure it is.
    alone, doubted = inputs.clone(), inputs.clone()
    made.shift.weight.zero_(), made.shift.bias.zero_()  # without the rest of the block
    alone[0, 1, 1] = 0.0
    assert made(alone)[0, 0] > made(doubted)[0, 0]
    doubted[0, 1, 0] = 0.61
    assert made(doubted)[0, 0] < made(inputs)[0, 0]


def test_the_rest_of_the_block_shifts_every_unit_within_its_bound():
    made, inputs = filter_of(1, scale=100.0), random_block(1, rows=64)
    known = torch.relu(
        made.layer(made.hidden, made._rest(inputs[..., 0].logit(1e-6), inputs[..., 1]))
    )
    assert made.layer(made.shift, known).abs().max() > 100
    free = made(inputs)
    made.shift.weight.zero_(), made.shift.bias.zero_()
    most = 3.0 * torch.nn.functional.softplus(made.out).sum()
    assert (free - made(inputs)).abs().max() <= most * 1.001


def test_a_row_does_not_depend_on_its_batch_to_the_bit():
    made, inputs = filter_of(2), random_block(2, rows=33, length=7)
    together = made(inputs)
    for row in range(33):
        assert torch.equal(made(inputs[row : row + 1])[0], together[row])


def test_the_policy_gives_the_filter_the_inputs_of_the_training(make_step):
    policy = create_policy("learn2pd", variant="monotone").use(filter_of(3))
    step = make_step([[0.5, 0.9, 0.2], [0.1, 0.3, 0.8]], [[True, False, True], [True] * 3])
    zero = torch.zeros(2, 3)
    assert torch.equal(
        policy.inputs(step, {}), MonotoneFilter.inputs_of(recorded(step, zero, zero))
    )
    chosen = policy.select(step, policy.init_state(2, 3, torch.device("cpu")))
    wanted = torch.sigmoid(filter_of(3)(policy.inputs(step, {}))) > 0.5
    assert torch.equal(chosen, step.masked & wanted)


def test_each_variant_reads_its_own_filter(tmp_path):
    UnmaskFilter(block_length=8, threshold=0.6, base_model="m").save_pretrained(
        tmp_path / "policies" / "learn2pd"
    )
    model = ModelContext("m", 8, 99, 100, path=str(tmp_path))
    monotone = create_policy("learn2pd", variant="monotone")
    with pytest.raises(L2PDError, match="policies/learn2pd_monotone"):
        monotone.for_model(model)
    filter_of(4).save_pretrained(tmp_path / "policies" / "learn2pd_monotone")
    bound = monotone.for_model(model)
    assert (bound.threshold, bound.filter) == (0.5, "m/policies/learn2pd_monotone")
    assert create_policy("learn2pd").for_model(model).threshold == 0.6
    for options, folder in (({"variant": "monotone"}, "learn2pd"), ({}, "learn2pd_monotone")):
        with pytest.raises(L2PDError, match="it is a filter of the policy "):
            create_policy("learn2pd", filter=str(tmp_path / "policies" / folder), **options)
    # It has no fixed block length.
    assert monotone.for_model(ModelContext("m", 5, 99, 100, path=str(tmp_path))).threshold == 0.5
