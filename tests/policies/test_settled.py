"""The signal filter sees in training what it sees in decoding, for every block length."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins import L2PDError, ModelContext, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.trajectories import Trajectories
from l2pd_policies.settled import Settled, SignalFilter
from l2pd_policies.settled.signals import SIGNALS
from tests.policies.recorded_steps import recorded

MASK, EOT, VOCABULARY = 30, 29, 31


@pytest.fixture
def filter_folder(tmp_path):
    torch.manual_seed(0)
    made = SignalFilter(threshold=0.55, base_model="m")
    for weight in made.parameters():
        weight.data.mul_(3)
    made.save_pretrained(tmp_path / "settled")
    return str(tmp_path / "settled")


class Watched(Settled):
    """Records the inputs of the filter."""

    def inputs(self, step, state):
        made = super().inputs(step, state)
        self.__dict__.setdefault("seen", []).append(made)
        return made


def decode(policy, rows, length, seed=0):
    """Decode a block with drifting random predictions: filter inputs, recorded steps, tokens."""
    generator = torch.Generator().manual_seed(seed)
    batch = BlockBatch.start(torch.full((rows, length), MASK), [policy] * rows, mask_token_id=MASK)
    base = torch.randn(rows, length, VOCABULARY, generator=generator) * 2
    records = []
    while batch.masked.any():
        base = base + torch.randn(rows, length, VOCABULARY, generator=generator)
        outcome = denoising_step(batch, base, end_of_text=EndOfText("block", (EOT,)))
        records.append(outcome.step)
    return batch, records


def trajectories(records, order):
    parts = [recorded(step, step.entropy, step.margin) for step in records]
    return Trajectories.concatenate([parts[i] for i in order])


@pytest.mark.parametrize("length", [1, 5, 32])
def test_training_sees_what_decoding_sees(filter_folder, length):
    policy = Watched(filter=filter_folder)
    _, records = decode(policy, 4, length)
    order = list(reversed(range(len(records))))
    data = trajectories(records, order)
    fed = torch.cat([policy.seen[i] for i in order])
    # Engines do not record rows that have ended. Here they are recorded, so cut them off.
    alive = data.masked.any(-1)
    assert torch.equal(SignalFilter.inputs_of(data)[alive], fed[alive])
    assert fed.shape[-1] == len(SIGNALS)


def loaded_filter(folder, length):
    policy = create_policy("settled", filter=folder)
    policy.init_state(1, length, torch.device("cpu"))
    return policy._on_device[torch.device("cpu")]


def random_inputs(rows, length):
    inputs = torch.rand(rows, length, len(SIGNALS))
    inputs[..., 1] = 1
    return inputs


def test_a_row_does_not_depend_on_its_batch_to_the_bit(filter_folder):
    loaded, inputs = loaded_filter(filter_folder, 32), random_inputs(17, 32)
    together = loaded(inputs)
    for row in range(17):
        assert torch.equal(loaded(inputs[row : row + 1])[0], together[row])


def test_positions_after_the_end_do_not_matter(filter_folder):
    loaded, inputs = loaded_filter(filter_folder, 8), random_inputs(1, 5)
    longer = torch.cat([inputs, torch.zeros(1, 3, len(SIGNALS))], dim=1)
    assert torch.allclose(loaded(longer)[:, :5], loaded(inputs), atol=1e-6)


def test_training_and_inference_compute_the_same():
    made = SignalFilter()
    inputs = random_inputs(6, 9)
    made.train()
    first = made(inputs)
    assert torch.allclose(first, made.eval()(inputs), atol=1e-5)


def test_it_is_small_and_fits_every_block_length(filter_folder):
    assert sum(p.numel() for p in SignalFilter().parameters()) <= 20_000
    policy = create_policy("settled", filter=filter_folder)
    for length in (1, 4, 64):
        policy.for_model(ModelContext("m", length, MASK, VOCABULARY))
        batch, _ = decode(policy, 3, length)
        assert not batch.masked.any()


def test_the_paper_s_filter_is_no_signal_filter(filter_folder):
    with pytest.raises(
        L2PDError, match="it is a filter of the policy settled; expected one of learn2pd"
    ):
        create_policy("learn2pd", filter=filter_folder)


def test_copies_keep_their_filter(filter_folder):
    policy = create_policy("settled", filter=filter_folder)
    one, _ = decode(policy, 2, 8)
    two, _ = decode(copy.deepcopy(policy), 2, 8)
    assert torch.equal(one.tokens, two.tokens)


@given(
    probability=st.lists(
        st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6), min_size=1, max_size=4
    ),
    masked=st.integers(0, 2**6 - 1),
    risk=st.sampled_from([0.0, 0.05, 0.25, 0.6]),
)
def test_the_least_doubtful_are_taken_within_the_risk(probability, masked, risk):
    policy = Settled(threshold=0.9, risk=risk)
    asked = torch.tensor(probability)
    open_ = torch.tensor([bool(masked >> i & 1) for i in range(6)]).expand_as(asked)
    taken = policy.accepts(asked, open_) & open_
    for row, doubts, got in zip(asked, (1 - asked) ** 0.7, taken, strict=True):
        order = sorted(range(6), key=lambda i: -float(row[i]))
        expected, spent = set(), torch.tensor(0.0)
        for i in order:
            if open_[0, i]:
                spent = spent + doubts[i]
                if spent <= risk**0.7 or row[i] > 0.9:
                    expected.add(i)
        surest = {float(row[i]) for i in expected}
        # Of equal probabilities at the bound of the risk, any may be taken.
        assert {float(row[i]) for i in got.nonzero().flatten().tolist()} == surest
        assert int(got.sum()) == len(expected)
