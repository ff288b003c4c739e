"""Options with one value per row: each row decodes as it does alone, to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import l2pd_policies
from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.options import describe
from l2pd_plugins.plugins import bind_policy, load_factory
from l2pd_plugins.resources import Resources
from l2pd_plugins.row_options import columns_of, kinds_of, with_columns
from l2pd_plugins.slots import BlockSlots
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.learned.familiar import Familiar
from l2pd_policies.settled import Settled, SignalFilter
from l2pd_policies.transformer_sampler import SamplerFilter

LENGTH, VOCABULARY, MASK, EOT = 8, 12, 11, 10
END = EndOfText("block", (EOT,))
MODEL = ModelContext("test", LENGTH, MASK, VOCABULARY)
SPECS = {spec.name: spec for spec in l2pd_policies.l2pd_policies()}
ROW_OPTIONS = {
    "fixed_schedule": {"steps", "tokens_per_step"},
    "random_order": {"steps", "tokens_per_step"},
    "confidence_threshold": {"threshold"},
    "fast_dllm_factor": {"factor"},
    "frechet": {"delta"},
    "eb_sampler": {"gamma"},
    "klass": {"threshold", "kl_threshold", "history"},
    "credit": {"threshold"},
    "cora": {"threshold", "persistence"},
    "local_leap": {"anchor_threshold", "threshold"},
    "hierarchy": {"threshold", "low_threshold"},
    "dream_confidence": {"steps", "tokens_per_step", "alg_temp"},
    "dream_margin": {"steps", "tokens_per_step", "alg_temp"},
    "dream_entropy": {"steps", "tokens_per_step", "alg_temp"},
    "ccd": {"candidates"},
    "sched": {"high", "low"},
    "pc_sampler": {"steps", "tokens_per_step", "decay", "alpha"},
    "saber": {"n", "mu"},
    "llada2_edit": {"threshold", "edit_threshold"},
    "leftmost_threshold": {"threshold"},
    "learn2pd": {"threshold", "fallback_threshold", "fallback_gamma"},
    "settled": {"threshold", "risk", "fallback_threshold", "fallback_gamma"},
    "transformer_sampler": {"threshold"},
    "oracle": set(),
}
"""The options of each policy that may have one value per row."""

LEVELS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
"""Logits of the predicted tokens; all others are near 0. So few confidences are reached often."""
REACH = 1.0
"""The distance within which blocks are like the only one of the training, so that a fallback
decides about some rows.
"""
REACHED = [math.exp(level) / (math.exp(level) + VOCABULARY - 2) for level in LEVELS]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory) -> Iterator[dict[str, dict[str, object]]]:
    """The options of policies that need files; each file is read once, as in a server."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for made, name in (
        (UnmaskFilter(block_length=LENGTH, threshold=0.3), "paper"),
        (SignalFilter(threshold=0.3), "signals"),
    ):
        size = made.described_size()
        one = torch.zeros(1, size, dtype=torch.float16)
        made.familiar = Familiar(torch.zeros(size), torch.ones(size), one, torch.tensor([REACH]))
        made.save_pretrained(folder / name)
    SamplerFilter().save_pretrained(folder / "sampler")
    table = torch.linspace(0.01, 0.2, VOCABULARY)
    save_file({"frequencies": table}, folder / "table.safetensors")
    with Resources().in_use():
        yield {
            "learn2pd": {"filter": str(folder / "paper"), "fallback": "confidence_threshold"},
            "settled": {"filter": str(folder / "signals")},
            "transformer_sampler": {"filter": str(folder / "sampler")},
            "pc_sampler": {"frequencies": str(folder / "table.safetensors")},
        }


@st.composite
def values(draw, option) -> object:
    """A value of a row option, also just at and just beside a confidence that is reached."""
    if option.kinds == {"whole"}:
        return draw(st.integers(int(option.at_least or 0), LENGTH))
    if draw(st.booleans()):
        reached = draw(st.sampled_from(REACHED))
        beside = draw(st.sampled_from([1.0, 1 + 1e-9, 1 - 1e-9, 1 + 1e-7, 1 - 1e-7]))
        return min(reached * beside, 0.999999)
    return draw(st.floats(0.0009765625, 0.99))


@st.composite
def policies(draw, name: str, fixed: dict[str, dict[str, object]]) -> UnmaskPolicy:
    """A policy with random values of its row options."""
    declared = describe(load_factory(SPECS[name])) or {}
    names = sorted(ROW_OPTIONS[name])
    if "steps" in names:  # one of the two
        names.remove(draw(st.sampled_from(["steps", "tokens_per_step"])))
    given = {each: draw(values(declared[each])) for each in names}
    return bind_policy(create_policy(name, **fixed.get(name, {}), **given), MODEL)


def rows_of(names: st.SearchStrategy[str], fixed: dict[str, dict[str, object]]):
    """The policies of some rows, each of one of these names."""
    one = names.flatmap(lambda name: policies(name, fixed))
    return st.lists(one, min_size=2, max_size=6)


def mixed(fixed: dict[str, dict[str, object]]):
    """The policies of some rows, of two or three names."""
    some = st.lists(st.sampled_from(sorted(SPECS)), min_size=2, max_size=3, unique=True)
    return some.flatmap(lambda names: rows_of(st.sampled_from(names), fixed))


def logits_of(row: int, time: int) -> Tensor:
    """(L, V): the logits of a row at its n-th step, most of which are those of the step before."""
    slow = torch.Generator().manual_seed(1000 * row)
    fast = torch.Generator().manual_seed(1000 * row + time + 1)
    shape = (LENGTH, 1)
    token = torch.randint(VOCABULARY - 1, shape, generator=slow)
    level = torch.randint(len(LEVELS), shape, generator=slow)
    other = torch.rand(shape, generator=fast) < 0.3
    token = torch.where(other, torch.randint(VOCABULARY - 1, shape, generator=fast), token)
    level = torch.where(other, torch.randint(len(LEVELS), shape, generator=fast), level)
    logits = torch.zeros(LENGTH, VOCABULARY)
    return logits.scatter(-1, token, torch.tensor(LEVELS)[level])


def reference_of(rows: list[int]) -> Tensor:
    return torch.stack([logits_of(row, 0).argmax(-1) for row in rows])


def generator_of(row: int) -> torch.Generator:
    return torch.Generator().manual_seed(row)


def started(rows: list[int], policies: list[UnmaskPolicy]) -> BlockBatch:
    return BlockBatch.start(
        torch.full((len(rows), LENGTH), MASK),
        policies,
        mask_token_id=MASK,
        canvas_length=torch.full((len(rows),), 3 * LENGTH),
        ignores_end=torch.ones(len(rows), dtype=torch.bool),
        reference=reference_of(rows),
        generators=[generator_of(row) for row in rows],
    )


def take_step(batch: BlockBatch, rows: list[int], times: dict[int, int]) -> None:
    """A step, and the next block in the rows whose blocks are full."""
    logits = torch.stack([logits_of(row, times[row]) for row in rows])
    denoising_step(batch, logits, end_of_text=END)
    full = [at for at, masked in enumerate(batch.masked.any(-1).tolist()) if not masked]
    if full:
        masks = torch.full((len(full), LENGTH), MASK)
        batch.advance(full, masks, reference=reference_of([rows[at] for at in full]))


def state_of(batch: BlockBatch, row: int) -> dict[str, Tensor]:
    group, at = batch._groups.places()[row]
    return {name: value[at] for name, value in group.state.items()}


def assert_same_row(batch: BlockBatch, at: int, alone: BlockBatch) -> None:
    for name in ("tokens", "masked", "present", "step_index", "block_index"):
        assert torch.equal(getattr(batch, name)[at], getattr(alone, name)[0]), name
    mine, its = state_of(batch, at), state_of(alone, 0)
    assert mine.keys() == its.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, its[name], rtol=0, atol=0, equal_nan=True)


def check_batch(data, chosen: list[UnmaskPolicy]) -> None:
    """A batch of these policies against each row alone; rows are dropped and reordered."""
    rows = list(range(len(chosen)))
    batch = started(rows, chosen)
    assert len(batch._groups._each) == len(set(kinds_of(chosen)))
    alone = {row: started([row], [policy]) for row, policy in enumerate(chosen)}
    times = dict.fromkeys(rows, 0)
    for _ in range(data.draw(st.integers(1, 14))):
        take_step(batch, rows, times)
        for at, row in enumerate(rows):
            take_step(alone[row], [row], times)
            times[row] += 1
            assert_same_row(batch, at, alone[row])
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(len(rows))))
            kept = order[: data.draw(st.integers(1, len(rows)))]
            batch.keep(kept)
            rows = [rows[at] for at in kept]
        assert batch.policies == [chosen[row] for row in rows]


def check_slots(data, chosen: list[UnmaskPolicy]) -> None:
    """Slots of these policies, of which each step takes some, against each row alone."""
    device = torch.device("cpu")
    slots = BlockSlots(len(chosen) + 1, LENGTH, mask_token_id=MASK, device=device)
    for slot, policy in enumerate(chosen):
        slots.assign(
            slot,
            policy,
            [MASK] * LENGTH,
            [True] * LENGTH,
            canvas_length=3 * LENGTH,
            ignores_end=True,
            generator=generator_of(slot),
        )
    assert len(slots._residents) == len(set(kinds_of(chosen)))
    alone = {row: started([row], [policy]) for row, policy in enumerate(chosen)}
    times = dict.fromkeys(alone, 0)
    for _ in range(data.draw(st.integers(1, 14))):
        order = data.draw(st.permutations(sorted(alone)))
        rows = list(order[: data.draw(st.integers(1, len(order)))])
        taken = slots.take(np.array(rows), reference=reference_of(rows))
        assert taken.block.policies == [chosen[row] for row in rows]
        logits = torch.stack([logits_of(row, times[row]) for row in rows])
        denoising_step(taken.block, logits, end_of_text=END)
        taken.advance(
            ~taken.block.masked.any(-1),
            torch.full_like(taken.block.tokens, MASK),
            torch.ones_like(taken.block.present),
        )
        slots.put(taken)
        for at, row in enumerate(rows):
            take_step(alone[row], [row], times)
            times[row] += 1
            assert_same_row(taken.block, at, alone[row])


@pytest.mark.parametrize("check", [check_batch, check_slots])
@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=12)
@given(data=st.data())
def test_rows_of_one_policy_decode_as_alone_whatever_their_options(fixed, name, check, data):
    check(data, data.draw(rows_of(st.just(name), fixed)))


@pytest.mark.parametrize("check", [check_batch, check_slots])
@settings(max_examples=40)
@given(data=st.data())
def test_rows_of_several_policies_decode_as_alone(fixed, check, data):
    check(data, data.draw(mixed(fixed)))


def test_every_option_that_may_differ_is_declared():
    """A new option of a policy is either in the table above or has a reason not to be."""
    fixed_options = {
        "credit": {"alpha", "beta", "gamma"},  # exponents in float64, and beta goes with them
        "local_leap": {"radius"},  # the width of a pooling window
        "transformer_sampler": {"temperature"},  # GPUs divide by a number in another way
    }
    for name, spec in SPECS.items():
        declared = describe(load_factory(spec)) or {}
        numbers = {o.name for o in declared.values() if o.kinds <= {"flag", "whole", "number"}}
        assert numbers == ROW_OPTIONS[name] | fixed_options.get(name, set()), name
        assert numbers & load_factory(spec).row_options == ROW_OPTIONS[name], name


def test_a_sum_of_doubts_at_the_bound_is_within_it_in_both_forms():
    """`risk` is raised to its power in float64, which no float32 column can do."""
    risks = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policies = [Settled(threshold=0.9999, risk=risk) for risk in risks.tolist()]
    probability = 1 - risks.float().view(-1, 1)
    masked = torch.ones_like(probability, dtype=torch.bool)
    mixed = with_columns(policies[0], columns_of(policies, torch.device("cpu")))
    rows = zip(policies, probability.split(1), strict=True)
    alone = torch.cat([policy.accepts(each, masked[:1]) for policy, each in rows])
    assert alone.any() and not alone.all()
    assert torch.equal(mixed.accepts(probability, masked), alone)


def test_a_margin_at_the_falling_threshold_reaches_it_in_both_forms(make_step):
    """The difference of `high` and `low` is computed in float64."""
    numbers = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policies = [create_policy("sched", high=high, low=low) for high, low in numbers.tolist()]
    thresholds = numbers[:, 0].float() + (numbers[:, 1] - numbers[:, 0]).float() * 0.5
    logits = torch.zeros(4000, 2, 3)
    logits[:, 0, 0] = 2 * thresholds  # the other position has margin 0
    step = make_step([[0.5, 1.0]] * 4000, [[True, False]] * 4000)
    step = step.changed(logits=logits, tokens=torch.full_like(step.tokens, 2))
    mixed = with_columns(policies[0], columns_of(policies, torch.device("cpu")))
    rows = [step.select_rows(torch.tensor([row]), [row]) for row in range(4000)]
    alone = torch.cat([policies[row].select(each, {}) for row, each in enumerate(rows)])
    assert alone[:, 0].all()
    assert torch.equal(mixed.select(step, {}), alone)
