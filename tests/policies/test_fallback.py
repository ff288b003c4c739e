"""Blocks unlike a filter's training are noticed, and a rule without training decides them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from l2pd_plugins import L2PDError, ModelContext, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.options import PolicyOptionError
from l2pd_plugins.slots import BlockSlots
from l2pd_plugins.testing import check_policy
from l2pd_plugins.trajectories import Trajectories
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.learned.familiar import FILE, OUTSIDE, PARTS, Familiar, describe, first_steps
from l2pd_policies.learned.training import familiar_blocks
from l2pd_policies.settled import SignalFilter

LENGTH, VOCABULARY, MASK = 8, 12, 11
OFF = EndOfText("off", ())
KINDS = {"learn2pd": UnmaskFilter, "settled": SignalFilter}


def described(values, masked=None):
    inputs = torch.tensor(values, dtype=torch.float32).view(1, -1, 1)
    masked = torch.ones(inputs.shape[:2], dtype=torch.bool) if masked is None else masked
    return describe(inputs, masked)[0].tolist()


def test_a_description_is_the_mean_the_deviation_and_the_means_of_the_parts():
    made = described([*range(8), *range(8)])
    assert made[:2] == pytest.approx([3.5, 5.25**0.5])
    assert made[2:] == pytest.approx([0.5, 2.5, 4.5, 6.5] * 2)


def test_only_masked_positions_are_described():
    masked = torch.tensor([[False] * 4 + [True] * 4 + [False] * 2])
    values = [9.0, 9, 9, 9, 1, 2, 3, 4, 9, 9]
    assert described(values, masked) == pytest.approx(described([1, 2, 3, 4]))
    assert described(values[:3], torch.zeros(1, 3, dtype=torch.bool)) == [0.0] * (2 + PARTS)


@pytest.mark.parametrize("times", [2, 3, 8])
def test_a_description_does_not_depend_on_the_block_s_length(times):
    values = [0.1, 0.9, 0.3, 0.3, 0.7]
    longer = [value for value in values for _ in range(times)]
    assert described(longer) == pytest.approx(described(values), abs=1e-5)


def training(prompts=200, seed=0):
    """Descriptions of two blocks of each prompt, in two clusters of different density."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(prompts, 2, 6, generator=generator)
    blocks = torch.stack([noise[:, 0] * 0.1, 5 + noise[:, 1]], dim=1)
    return blocks.flatten(0, 1), torch.arange(prompts).repeat_interleave(2)


def test_blocks_like_those_of_the_training_are_known_and_others_are_not():
    familiar = Familiar.of(*training())
    assert not familiar.unlike(training()[0]).any()
    new = familiar.unlike(training(seed=1)[0]).float().mean()
    assert new <= 2 * OUTSIDE
    between, outside = torch.full((1, 6), 2.0), torch.full((1, 6), 12.0)
    assert familiar.unlike(between).all() and familiar.unlike(outside).all()
    assert familiar.unlike(torch.full((1, 6), torch.nan)).all()


def test_a_block_does_not_depend_on_the_others_to_the_bit():
    familiar = Familiar.of(*training())
    blocks = training(prompts=300, seed=2)[0] * 1.5
    together = familiar.unlike(blocks)
    assert together.any() and not together.all()
    alone = torch.cat([familiar.unlike(block.unsqueeze(0)) for block in blocks])
    assert torch.equal(together, alone)
    inputs = torch.rand(9, 13, 4)
    masked = torch.rand(9, 13) > 0.3
    whole = describe(inputs, masked)
    for row in range(9):
        one = slice(row, row + 1)
        assert torch.equal(describe(inputs[one].clone(), masked[one].clone()), whole[one])


def test_no_more_examples_are_kept_than_are_allowed(monkeypatch):
    monkeypatch.setattr("l2pd_policies.learned.familiar.MOST_EXAMPLES", 40)
    familiar = Familiar.of(*training())
    assert familiar.examples.shape == (40, 6)
    assert familiar.unlike(training(seed=1)[0]).float().mean() <= 2 * OUTSIDE
    assert familiar.unlike(torch.full((1, 6), -4.0)).all()


@pytest.mark.parametrize("prompts", [2, 3])
def test_few_prompts_are_enough(prompts):
    familiar = Familiar.of(*training(prompts))
    assert familiar.reach.isfinite().all() and (familiar.reach > 0).all()


def test_one_prompt_cannot_be_compared():
    with pytest.raises(L2PDError, match="at least two prompts"):
        Familiar.of(torch.rand(3, 6), torch.zeros(3, dtype=torch.int64))


def steps(rows):
    """Trajectories of rows (prompt, policy, block, step)."""
    count = len(rows)
    values = torch.tensor(rows)
    numbers = torch.arange(count).unsqueeze(-1).expand(count, LENGTH) / 100
    every = torch.ones(count, LENGTH, dtype=torch.bool)
    return Trajectories(
        *values.T.unbind(), every, every, numbers.to(torch.int32), numbers, numbers, numbers, every
    )


def test_each_block_of_each_prompt_counts_once():
    rows = [(1, 1, 0, 0), (1, 0, 0, 1), (1, 0, 0, 0), (0, 1, 2, 0), (0, 1, 2, 1), (1, 0, 1, 0)]
    assert first_steps(steps(rows)).tolist() == [3, 2, 5]


def test_the_blocks_of_one_policy_can_be_chosen():
    data = steps([(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0)])
    mine = familiar_blocks(UnmaskFilter, data, 1)
    assert mine.centre[0] == pytest.approx(0.025)
    assert familiar_blocks(UnmaskFilter, data).centre[0] == pytest.approx(0.005)


# The folder


def filter_of(name, familiar=True):
    """A filter that accepts everything, and knows blocks of even, high confidence."""
    made = KINDS[name](block_length=LENGTH if name == "learn2pd" else None, base_model="m")
    for weight in made.parameters():
        torch.nn.init.zeros_(weight)
    made.threshold = 0.4
    if familiar:
        data = first_of(logits_of("known"))
        example = made.described(made.inputs_of(data), data.masked)
        size = made.described_size()
        assert example.shape == (1, size)
        made.familiar = Familiar(
            torch.zeros(size), torch.ones(size), example.to(torch.float16), torch.tensor([0.3])
        )
    return made.eval().requires_grad_(False)


def logits_of(kind, rows=1):
    """Predictions of a block: "known" ones are sure in the same way everywhere, "new" ones are sure
    in the first half alone.
    """
    logits = torch.zeros(rows, LENGTH, VOCABULARY)
    logits[:, range(LENGTH), range(LENGTH)] = 6.0
    if kind == "new":
        logits[:, LENGTH // 2 :] /= 3
    return logits


def first_of(logits):
    batch = BlockBatch.start(
        torch.full(logits.shape[:2], MASK),
        [create_policy("confidence_threshold")] * len(logits),
        mask_token_id=MASK,
        observe=frozenset({"margin", "entropy"}),
    )
    step = denoising_step(batch, logits, end_of_text=OFF).step
    zeros = torch.zeros(len(logits), dtype=torch.int64)
    return Trajectories(
        prompt=zeros, policy=zeros, block=zeros, step=zeros, masked=step.masked,
        present=step.present, x0=step.x0.to(torch.int32), confidence=step.confidence,
        entropy=step.entropy, margin=step.margin, correct=step.masked,
    )  # fmt: skip


@pytest.mark.parametrize("name", list(KINDS))
def test_a_filter_keeps_its_training_s_blocks_in_a_file_of_its_own(name, tmp_path):
    made = filter_of(name)
    made.save_pretrained(tmp_path / "with")
    filter_of(name, familiar=False).save_pretrained(tmp_path / "without")
    read = (tmp_path / "with" / "model.safetensors").read_bytes
    assert read() == (tmp_path / "without" / "model.safetensors").read_bytes()
    assert not (tmp_path / "without" / FILE).exists()
    known, bare = (create_policy(name, filter=str(tmp_path / each)) for each in ("with", "without"))
    for part, value in known._loaded.familiar.named_buffers():
        assert torch.equal(value, dict(made.familiar.named_buffers())[part])
    assert bare._loaded.familiar is None
    assert known.fingerprint() != bare.fingerprint()


CHANGES = {
    "centre": lambda tensors: tensors["centre"][:-1],
    "scale": lambda tensors: tensors["scale"] * 0,
    "examples": lambda tensors: tensors["examples"].float(),
    "reach": lambda tensors: tensors["reach"] * torch.nan,
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_file_that_is_not_one_is_named(name, tmp_path):
    filter_of("settled").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({**tensors, name: CHANGES[name](tensors)}, tmp_path / FILE)
    with pytest.raises(L2PDError, match=FILE):
        create_policy("settled", filter=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{}" * 9])
def test_a_broken_file_is_named(content, tmp_path):
    filter_of("settled").save_pretrained(tmp_path)
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(L2PDError, match=FILE):
        create_policy("settled", filter=str(tmp_path))


def test_a_filter_without_the_file_says_once_that_it_cannot_compare(tmp_path, caplog):
    filter_of("settled", familiar=False).save_pretrained(tmp_path)
    model = ModelContext("m", LENGTH, MASK, VOCABULARY)
    with caplog.at_level(logging.WARNING):
        create_policy("settled", filter=str(tmp_path), fallback="none").for_model(model)
        assert not caplog.records
        for _ in range(2):
            policy = create_policy("settled", filter=str(tmp_path)).for_model(model)
    (record,) = caplog.records
    assert FILE in record.message and "learn2pd familiar" in record.message
    assert "fallback" not in policy.init_state(1, LENGTH, torch.device("cpu"))


# The decisions


def policy_of(name="settled", **options):
    options = {"threshold": 0.4, "fallback": "confidence_threshold", **options}
    return create_policy(name, **options).use(filter_of(name))


def tokens_of(policies, logits, steps=1):
    batch = BlockBatch.start(
        torch.full((len(policies), LENGTH), MASK), policies, mask_token_id=MASK
    )
    for each in range(steps):
        denoising_step(batch, logits[each] if steps > 1 else logits, end_of_text=OFF)
    return batch


@pytest.mark.parametrize("name", list(KINDS))
def test_the_threshold_decides_unlike_blocks_alone_within_one_group(name):
    logits = torch.cat([logits_of("known"), logits_of("new"), logits_of("known")])
    policy = policy_of(name)
    batch = tokens_of([policy] * 3, logits)
    assert batch.fallback.tolist() == [False, True, False]
    expected = tokens_of([create_policy("confidence_threshold")] * 3, logits).tokens
    assert torch.equal(batch.tokens[1], expected[1])
    assert (batch.tokens[1] == MASK).sum() == LENGTH // 2
    assert not batch.masked[[0, 2]].any()  # the filter accepts everything
    bold = tokens_of([policy_of(name, fallback="none")] * 3, logits)
    assert bold.fallback is None and not bold.masked.any()


def test_the_threshold_of_the_fallback_is_an_option():
    logits = logits_of("new")
    confidence = float(logits[0, -1, :MASK].softmax(-1).max())  # the mask token is suppressed
    for threshold, left in ((confidence + 0.01, LENGTH // 2), (confidence - 0.01, 0)):
        batch = tokens_of([policy_of(fallback_threshold=threshold)], logits)
        assert int(batch.masked.sum()) == left


def test_a_confidence_at_the_fallback_threshold_is_enough():
    """As with `confidence_threshold` itself."""
    logits = logits_of("new")
    reached = float(first_of(logits).confidence[0, -1])
    for policy in (
        policy_of(fallback_threshold=reached),
        create_policy("confidence_threshold", threshold=reached),
    ):
        assert not tokens_of([policy], logits).masked.any()


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("gamma", [None, 0.2, 0.8])
def test_the_entropy_bound_decides_unlike_blocks_as_its_policy_does(name, gamma):
    logits = torch.cat([logits_of("known"), logits_of("new")])
    logits[1] *= torch.linspace(1, 0.9, LENGTH).unsqueeze(-1)  # no two entropies are equal
    given = {} if gamma is None else {"fallback_gamma": gamma}
    batch = tokens_of([policy_of(name, fallback="eb_sampler", **given)] * 2, logits)
    assert batch.fallback.tolist() == [False, True] and not batch.masked[0].any()
    probability = logits[1, :, :MASK].softmax(-1).double()
    entropy = -(probability * probability.log()).sum(-1)
    bound = 0.02 if gamma is None else gamma
    order = sorted(range(LENGTH), key=lambda at: (float(entropy[at]), at))
    spent, wanted = 0.0, set()
    for at in order:  # what is spent before a position, which is itself free
        if spent > bound:
            break
        wanted.add(at)
        spent += float(entropy[at])
    assert {at for at in range(LENGTH) if batch.tokens[1, at] != MASK} == wanted
    assert 0 < len(wanted) < LENGTH


def test_only_the_entropy_bound_needs_the_entropy():
    assert "entropy" in create_policy("learn2pd", fallback="eb_sampler").requires
    for fallback in ("confidence_threshold", "none"):
        assert "entropy" not in create_policy("learn2pd", fallback=fallback).requires


def test_a_block_is_compared_before_anything_is_committed_in_it_and_not_later():
    careful = policy_of(threshold=0.999999, risk=0.0)  # commits one position per step
    batch = tokens_of([careful], logits_of("known"))
    denoising_step(batch, logits_of("new"), end_of_text=OFF)
    assert batch.masked.any() and batch.fallback.tolist() == [False]


def test_what_was_unlike_once_stays_with_the_fallback_to_the_end_of_its_answer():
    known, new = logits_of("known"), logits_of("new")
    batch = tokens_of([policy_of()] * 3, torch.cat([new, known, known]))
    assert batch.fallback.tolist() == [True, False, False]
    while batch.masked.any():
        denoising_step(batch, torch.cat([new, known, known]), end_of_text=OFF)
    batch.advance([0, 1, 2], torch.full((3, LENGTH), MASK))
    denoising_step(batch, torch.cat([known, new, known]), end_of_text=OFF)
    assert batch.fallback.tolist() == [True, True, False]
    assert int(batch.masked[1].sum()) == LENGTH // 2 and not batch.masked[2].any()


def test_a_slot_s_next_request_is_compared_anew():
    """As in an engine of slots: the next block of an answer keeps the verdict, another answer does
    not.
    """
    policy, masks = policy_of(), torch.full((1, LENGTH), MASK)
    everything = torch.ones(1, LENGTH, dtype=torch.bool)
    slots = BlockSlots(1, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))

    def step(kind, next_block=False):
        taken = slots.take(np.array([0]))
        denoising_step(taken.block, logits_of(kind), end_of_text=OFF)
        told = taken.block.fallback.tolist()
        if next_block:
            taken.advance(torch.tensor([True]), masks, everything)
        slots.put(taken)
        return told

    slots.assign(0, policy, masks[0].tolist(), everything[0].tolist())
    assert step("new", next_block=True) == [True]
    assert step("known") == [True]
    slots.assign(0, policy, masks[0].tolist(), everything[0].tolist())
    assert step("known") == [False]


@pytest.mark.parametrize("fallback", ["eb_sampler", "confidence_threshold"])
@pytest.mark.parametrize("name", list(KINDS))
def test_a_policy_with_a_fallback_passes_the_kit(name, fallback):
    check_policy(lambda: policy_of(name, fallback=fallback), block_lengths=(LENGTH,), verbose=False)


def test_rows_of_policies_without_a_fallback_have_none():
    logits = torch.cat([logits_of("new"), logits_of("new")])
    batch = tokens_of([create_policy("confidence_threshold"), policy_of()], logits)
    assert batch.fallback.tolist() == [False, True]


def test_the_paper_s_policy_has_no_fallback_unless_asked():
    assert create_policy("learn2pd").fallback == "none"
    assert create_policy("settled").fallback == "eb_sampler"


@pytest.mark.parametrize(
    ("option", "value"),
    [("fallback", "klass"), ("fallback_threshold", 1.5), ("fallback_gamma", -0.1)],
)
def test_options_are_bounded(option, value):
    with pytest.raises(PolicyOptionError, match=option):
        create_policy("settled", **{option: value})
