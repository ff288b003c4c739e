"""A policy that misbehaves in any way, in any call, affects only its own rows."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins import policy_calls
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import PolicyRuntimeError
from l2pd_plugins.once import Once
from l2pd_plugins.policy import RemaskingPolicy
from l2pd_plugins.slots import BlockSlots
from tests.core.misbehaviour import ATTRIBUTES, FAULTS, Misbehaving, Steady, with_attribute

LENGTH, VOCABULARY, MASK, EOT = 5, 9, 8, 7
END = EndOfText("block", (EOT,))
FAULT_IDS = [" ".join(key) for key in FAULTS]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(policy_calls, "_first_failure", Once())
    logging.getLogger("l2pd_plugins.policy_calls").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("l2pd_plugins.policy_calls").setLevel(logging.NOTSET)


def logits_of(row: int, time: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * row + time)
    return torch.randn(LENGTH, VOCABULARY, generator=generator) * 2


def start(policies, on_error="progress") -> BlockBatch:
    tokens = torch.full((len(policies), LENGTH), MASK)
    return BlockBatch.start(tokens, policies, mask_token_id=MASK, on_error=on_error)


def take_step(batch: BlockBatch, rows: list[int], time: int) -> None:
    denoising_step(batch, torch.stack([logits_of(r, time) for r in rows]), end_of_text=END)


def decode_blocks(
    policies, rows: list[int], blocks: int = 3, on_error="progress"
) -> dict[int, list[list[int]]]:
    """The tokens after each step of some blocks, for each row. All rows advance at the same steps
    and change their places in the batch."""
    batch, order = start(policies, on_error), list(rows)
    seen: dict[int, list[list[int]]] = {row: [] for row in rows}
    for block in range(blocks):
        if block:
            # The rows advance in two parts, so that only a part of a group begins a new block.
            for part in (range(0, len(order), 2), range(1, len(order), 2)):
                if part:
                    batch.advance(list(part), torch.full((len(part), LENGTH), MASK))
        for step in range(LENGTH):
            take_step(batch, order, LENGTH * block + step)
            for at, row in enumerate(order):
                seen[row].append(batch.tokens[at].tolist())
        assert not batch.masked.any()
        assert (batch.tokens != MASK).all()
        batch.keep(list(reversed(range(len(order)))))
        order.reverse()
    return seen


GOOD = [0, 2, 4]


def beside(bad) -> dict[int, list[list[int]]]:
    """What good rows decode beside two rows of a bad policy."""
    good = Steady()
    found = decode_blocks([good, bad, good, bad, good], [0, 1, 2, 3, 4])
    return {row: found[row] for row in GOOD}


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, list[list[int]]]:
    return decode_blocks([Steady()] * 3, GOOD)


@pytest.mark.parametrize("at", [0, 1, 3], ids="call {}".format)
@pytest.mark.parametrize("key", FAULTS, ids=FAULT_IDS)
def test_the_other_rows_decode_as_without_it(key, at, undisturbed):
    assert beside(Misbehaving(key[0], FAULTS[key], at)) == undisturbed


@pytest.mark.parametrize("key", ATTRIBUTES)
def test_the_other_rows_decode_as_without_the_bad_attribute(key, undisturbed):
    assert beside(with_attribute(*ATTRIBUTES[key])) == undisturbed


@pytest.mark.parametrize("at", [0, 2], ids="call {}".format)
@pytest.mark.parametrize("key", FAULTS, ids=FAULT_IDS)
def test_a_bad_policy_alone_in_its_batch_still_ends(key, at):
    decode_blocks([Misbehaving(key[0], FAULTS[key], at)] * 2, [0, 1])


@pytest.mark.parametrize("key", FAULTS, ids=FAULT_IDS)
def test_raised_errors_name_the_policy_and_the_method(key):
    method = {"state": "select", "input": "select"}.get(key[0], key[0])
    policy = Misbehaving(key[0], FAULTS[key], at=1)
    with pytest.raises(PolicyRuntimeError, match=f"policy 'misbehaving': {method} failed: ") as got:
        decode_blocks([Steady(), policy], [0, 1], on_error="raise")
    assert "\n" not in str(got.value)
    str(got.value).encode()
    assert len(str(got.value)) < 1000


@pytest.mark.parametrize("key", ATTRIBUTES)
def test_raised_errors_name_the_bad_attribute(key):
    name, value = ATTRIBUTES[key]
    policy = with_attribute(name, value)
    if name == "name":  # a decode does not need it, and other failures are still reported
        policy.method, policy.fault = "select", FAULTS["select", "none"]
        name, wanted = "select", "Odd|3|.ud800"
    else:
        wanted = "odd"
    with pytest.raises(PolicyRuntimeError, match=f"policy '({wanted}).*': {name} failed: ") as got:
        take_step(start([policy], "raise"), [0], 0)
    str(got.value).encode()


def test_one_call_may_have_its_own_on_error():
    policy = Misbehaving("select", FAULTS["select", "none"])
    batch = start([policy], "raise")
    denoising_step(batch, logits_of(0, 0)[None], end_of_text=END, on_error="progress")
    with pytest.raises(PolicyRuntimeError):
        denoising_step(batch, logits_of(0, 0)[None], end_of_text=END)


def test_no_row_has_advanced_if_advancing_raises():
    batch = start([Steady(), Misbehaving("init_state", FAULTS["init_state", "dtype"], 1)], "raise")
    take_step(batch, [0, 1], 0)
    before = batch.tokens.clone(), batch.block_index.clone(), batch._groups[0].state["seen"].clone()
    with pytest.raises(PolicyRuntimeError, match=r"init_state failed: gave .*float32"):
        batch.advance([0, 1], torch.full((2, LENGTH), MASK))
    after = batch.tokens, batch.block_index, batch._groups[0].state["seen"]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class Squeezing(Steady):
    """Its count loses its only dimension if it has one row."""

    def init_state(self, batch_size, block_length, device):
        return {"steps": torch.zeros(batch_size, device=device)}

    def select(self, step, state):
        state["steps"].squeeze_()
        return step.masked


def test_a_count_without_a_dimension_affects_only_its_own_row(undisturbed):
    found = decode_blocks([Steady(), Squeezing(), Steady()], [0, 1, 2])
    assert {row: found[row] for row in (0, 2)} == {row: undisturbed[row] for row in (0, 2)}


@pytest.mark.parametrize("count", [1, 2])
def test_writes_that_inference_mode_does_not_count_freeze_no_block(count):
    policy = Misbehaving("input", FAULTS["input", "masked"])
    with torch.inference_mode():
        decode_blocks([policy, Steady()][:count], [0, 1][:count])


def test_batches_with_different_states_can_be_gathered(undisturbed):
    """`gather`: if the states of a policy in two batches differ in form, only its rows fail."""
    good, odd = Steady(), Misbehaving("init_state", FAULTS["init_state", "renamed"], 1)
    first, second = start([good, odd]), start([odd, good, good])
    third = start([odd])
    rows = [(first, 0), (first, 1), (second, 1), (second, 0), (second, 2), (third, 0)]
    batch = BlockBatch.gather(rows)
    for time in range(LENGTH):
        take_step(batch, [0, 1, 2, 3, 4, 5], time)
        for at, row in ((0, 0), (2, 2), (4, 4)):
            assert batch.tokens[at].tolist() == undisturbed[row][time]


class Shifting(Steady):
    """Begins each batch of blocks with a different dtype."""

    dtypes = (torch.int64, torch.float32)

    def init_state(self, batch_size, block_length, device):
        self.dtypes = self.dtypes[::-1]
        return {"seen": torch.full((batch_size, block_length), -1, dtype=self.dtypes[1])}

    def select(self, step, state):
        state["seen"] = step.x0.to(state["seen"].dtype)
        return step.masked & (step.confidence > 0.8)


@pytest.mark.parametrize("on_error", ["raise", "progress"])
def test_states_of_two_dtypes_are_not_joined(on_error, undisturbed):
    policy = Shifting()
    first, second = start([Steady(), policy], on_error), start([policy], on_error)
    rows = [(first, 0), (first, 1), (second, 0)]
    if on_error == "raise":
        with pytest.raises(
            PolicyRuntimeError, match="'shifting': init_state failed: gave the state"
        ):
            BlockBatch.gather(rows)
        return
    batch = BlockBatch.gather(rows)
    for time in range(LENGTH):
        take_step(batch, [0, 1, 2], time)
        assert batch.tokens[0].tolist() == undisturbed[0][time]
    assert not batch.masked.any()


@pytest.mark.parametrize("at", [0, 3], ids="call {}".format)
@pytest.mark.parametrize("key", FAULTS, ids=FAULT_IDS)
def test_in_slots_a_bad_policy_affects_only_its_own_slots(key, at):
    def decode(bad) -> list[list[list[int]]]:
        slots = BlockSlots(4, LENGTH, mask_token_id=MASK, device=torch.device("cpu"))
        good = Steady()
        chosen = [0, 1, 2, 3] if bad is not None else [0, 2]
        for slot in chosen:
            policy = bad if slot % 2 else good
            slots.assign(slot, policy, [MASK] * LENGTH, [True] * LENGTH)
        seen = []
        for time in range(2 * LENGTH):
            batch = slots.take(np.array(chosen))
            take_step(batch.block, chosen, time)
            tokens = batch.block.tokens.tolist()
            seen.append([tokens[chosen.index(slot)] for slot in (0, 2)])
            full = ~batch.block.masked.any(-1)
            batch.advance(
                full, torch.full_like(batch.block.tokens, MASK), batch.block.present | True
            )
            slots.put(batch)
        return seen

    assert decode(Misbehaving(key[0], FAULTS[key], at)) == decode(None)


def test_failures_are_logged_once_for_each_policy(caplog):
    logging.getLogger("l2pd_plugins.policy_calls").setLevel(logging.NOTSET)
    policy = Misbehaving("select", FAULTS["select", "surrogates"])
    with caplog.at_level(logging.ERROR):
        decode_blocks([policy, Steady()], [0, 1])
    (record,) = caplog.records
    assert record.getMessage().startswith("policy 'misbehaving': select failed; its rows continue")
    assert record.getMessage().isprintable()


def test_names_that_change_at_each_reading_do_not_fill_the_log(caplog, monkeypatch):
    logging.getLogger("l2pd_plugins.policy_calls").setLevel(logging.NOTSET)
    monkeypatch.setattr(policy_calls, "_first_failure", Once(3))
    count = iter(range(1000))
    policy = with_attribute("name", property(lambda self: f"policy-{next(count)}"))
    policy.method, policy.fault = "select", FAULTS["select", "none"]
    with caplog.at_level(logging.ERROR):
        decode_blocks([policy], [0])
    assert len(caplog.records) == len(policy_calls._first_failure.seen) == 3


@given(data=st.data())
def test_any_mixture_of_misbehaviour_leaves_good_rows_alone(data):
    keys = st.sampled_from(sorted(FAULTS))
    kinds = data.draw(st.lists(st.none() | st.tuples(keys, st.integers(0, 7)), max_size=6))
    good = Steady()
    policies = [good if k is None else Misbehaving(k[0][0], FAULTS[k[0]], k[1]) for k in kinds]
    policies = [good, *policies]
    rows = list(range(len(policies)))
    found = decode_blocks(policies, rows, blocks=2)
    kept = [row for row in rows if policies[row] is good]
    wanted = decode_blocks([good] * len(kept), kept, blocks=2)
    assert {row: found[row] for row in kept} == wanted


class WritesToLogits(Steady):
    """At its second call, makes another token the most likely one, in place."""

    requires = frozenset({"confidence", "entropy", "margin", "logits"})

    def __init__(self) -> None:
        self.calls = 0

    def select(self, step, state):
        self.calls += 1
        if self.calls == 2:
            step.logits.zero_()
            step.logits[..., 0] = 99.0
        return torch.zeros_like(step.masked)


class OnlyProgress(Steady):
    def select(self, step, state):
        return torch.zeros_like(step.masked)


@pytest.mark.parametrize("rows", [[0], [0, 1]])
def test_a_write_to_the_logits_is_detected_and_changes_no_answer(rows):
    def decoded(policy):
        batch = start([policy] * len(rows), "progress")
        while batch.masked.any():
            take_step(batch, rows, int(batch.step_index.max()))
        return batch.tokens.tolist()

    batch = start([WritesToLogits()] * len(rows), "raise")
    take_step(batch, rows, 0)
    with pytest.raises(PolicyRuntimeError, match=r"select failed: changed step\.logits in place"):
        take_step(batch, rows, 1)
    wanted = decoded(OnlyProgress())
    assert decoded(WritesToLogits()) == wanted
    with torch.inference_mode():  # in which torch counts no writes
        assert decoded(WritesToLogits()) == wanted


class WritesInRemask(RemaskingPolicy):
    """Writes to these tensors of its input in `remask`, and remasks nothing."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def select(self, step, state):
        return torch.zeros_like(step.masked)

    def remask(self, step, state):
        for name in self.names:
            getattr(step, name).fill_(1)
        return torch.zeros_like(step.masked)


@pytest.mark.parametrize("count", [True, False], ids=["counted", "in inference mode"])
@pytest.mark.parametrize("name", ["tokens", "masked", "x0", "confidence"])
def test_a_write_in_remask_changes_no_answer(name, count):
    def decoded(*names):
        batch, seen = start([WritesInRemask(*names)] * 2), []
        for time in range(LENGTH):
            logits = torch.stack([logits_of(row, time) for row in (0, 1)])
            outcome = denoising_step(batch, logits, end_of_text=END)
            seen.append((batch.tokens.tolist(), outcome.step.x0.tolist()))
        return seen, batch.masked.any().item()

    with nullcontext() if count else torch.inference_mode():
        assert decoded(name) == decoded()
