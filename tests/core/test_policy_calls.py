"""What a policy may return and keep as state, property by property, and the errors otherwise."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from l2pd_plugins import policy_calls
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.errors import PolicyRuntimeError
from l2pd_plugins.once import Once
from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.policy_calls import Runner, prepare, report_failure, stand_in

ROWS, LENGTH, VOCABULARY, MASK = 2, 3, 7, 6
LIKE = torch.full((ROWS, LENGTH), MASK)
OFF = EndOfText("off", ())


class Own(torch.Tensor):
    """A tensor of a user-defined class."""


class Policy(UnmaskPolicy):
    """Returns the answers and states that it was made with."""

    def __init__(self, answer=None, first=None, later=None) -> None:
        self.answer = torch.zeros(ROWS, LENGTH, dtype=torch.bool) if answer is None else answer
        self.first, self.later = {} if first is None else first, later

    def init_state(self, batch_size, block_length, device):
        assert (batch_size, block_length, device) == (ROWS, LENGTH, LIKE.device)
        return self.first

    def select(self, step, state):
        if self.later is not None:
            state.clear()
            state.update(self.later)
        return self.answer


def start(policy, on_error="raise") -> BlockBatch:
    return BlockBatch.start(LIKE.clone(), [policy] * ROWS, mask_token_id=MASK, on_error=on_error)


def step(batch: BlockBatch) -> None:
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0))
    denoising_step(batch, logits, end_of_text=OFF)


GOOD = torch.zeros(ROWS, 4)
BAD_STATES = {
    "a number": (4.0, "int|float"),
    "another class": (GOOD.as_subclass(Own), "Own"),
    "another device": (GOOD.to("meta"), r"on meta"),
    "sparse": (GOOD.to_sparse(), "sparse"),
    "requires grad": (GOOD.clone().requires_grad_(), "on cpu, requires grad"),
    "fewer rows": (GOOD[:1], r"\(1, 4\)"),
    "no rows": (torch.tensor(0.0), r"\(\)"),
}
OTHER_STATES = {
    **BAD_STATES,
    "another dtype": (GOOD.double(), "float64"),
    "another shape": (torch.zeros(ROWS, 5), r"\(2, 5\)"),
    "one dimension more": (torch.zeros(ROWS, 4, 1), r"\(2, 4, 1\)"),
}


@pytest.mark.parametrize("key", BAD_STATES)
def test_a_state_begins_with_plain_tensors_of_the_batch(key):
    value, words = BAD_STATES[key]
    with pytest.raises(
        PolicyRuntimeError,
        match=rf"init_state failed: state 'a' is .*({words}).*; expected a plain tensor on cpu "
        "with 2 rows",
    ):
        start(Policy(first={"a": value}))


@pytest.mark.parametrize("key", OTHER_STATES)
def test_a_state_keeps_the_form_that_it_began_with(key):
    value, words = OTHER_STATES[key]
    batch = start(Policy(first={"a": GOOD}, later={"a": value}))
    with pytest.raises(
        PolicyRuntimeError,
        match=rf"select failed: left state 'a' as .*({words}).*; it began as "
        r"torch.float32 \(2, 4\) on cpu",
    ):
        step(batch)
    batch = start(Policy(first={"a": GOOD}, later={"a": value}), "progress")
    step(batch)
    assert batch.states[0]["a"] is GOOD
    assert batch.masked.sum(-1).tolist() == [LENGTH - 1] * ROWS


@pytest.mark.parametrize("later", [{}, {"b": GOOD}, {"a": GOOD, "b": GOOD}])
def test_a_state_keeps_its_names(later):
    said = ", ".join(map(repr, later)) or "none"
    wanted = f"left the state with the names {said}; it began with 'a'"
    with pytest.raises(PolicyRuntimeError, match=wanted):
        step(start(Policy(first={"a": GOOD}, later=later)))


def test_an_empty_state_must_stay_empty():
    with pytest.raises(PolicyRuntimeError, match="with the names 'a'; it began with none"):
        step(start(Policy(later={"a": GOOD})))


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ([], "returned list; expected a dict of tensors"),
        (None, "returned NoneType; expected a dict of tensors"),
        ({3: GOOD}, "the state has a key of type int; expected str"),
    ],
)
def test_a_state_is_a_dict_of_names(first, words):
    policy = Policy()
    policy.first = first
    with pytest.raises(PolicyRuntimeError, match=words):
        start(policy)


def test_carried_tensors_must_be_in_the_state():
    policy = Policy(first={"a": GOOD})
    policy.carries = frozenset({"a", "c", "b"})
    with pytest.raises(PolicyRuntimeError, match="gave no state 'b', which `carries` names"):
        start(policy)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("all", "str; expected a tensor"),
        (torch.zeros(ROWS, LENGTH).bool().as_subclass(Own), "Own; expected a tensor"),
        (torch.zeros(ROWS, LENGTH), "torch.float32 (2, 3) on cpu"),
        (torch.zeros(1, LENGTH).bool(), "torch.bool (1, 3) on cpu"),
        (torch.zeros(ROWS, LENGTH).bool().to("meta"), "torch.bool (2, 3) on meta"),
        (torch.zeros(ROWS, LENGTH).bool().to_sparse(), "torch.bool torch.sparse_coo (2, 3) on cpu"),
    ],
)
def test_an_answer_is_a_dense_bool_tensor_of_the_block(answer, words):
    expected = "" if "expected" in words else "; expected a dense bool tensor (2, 3) on cpu"
    with pytest.raises(PolicyRuntimeError, match=re.escape(f"returned {words}{expected}")):
        step(start(Policy(answer)))


def test_a_later_block_begins_with_the_same_form_of_state():
    policy = Policy(first={"a": GOOD})
    runner, _ = prepare(policy, ROWS, LIKE, "raise")
    assert runner.initial_state(ROWS, LIKE)["a"] is GOOD
    policy.first = {"a": GOOD.double()}
    with pytest.raises(
        policy_calls.ContractError,
        match=r"gave the state 'a': torch.float64 \(rows, 4\) on cpu, where the first block began "
        r"with the state 'a': torch.float32 \(rows, 4\) on cpu",
    ):
        runner.initial_state(ROWS, LIKE)


def test_the_form_has_the_number_of_rows():
    runner, state = prepare(Policy(first={"a": GOOD}), ROWS, LIKE, "raise")
    assert runner.keeps_form(state, LIKE)
    assert not runner.keeps_form(state, LIKE[:1])
    assert Runner(runner.policy, runner.traits).keeps_form({}, LIKE)


class Writing(UnmaskPolicy):
    """Writes to its step, or changes the shape of a tensor in it."""

    requires = frozenset({"confidence", "entropy", "margin", "logits", "reference", "committed"})

    def __init__(self, name: str, how: str) -> None:
        self.written, self.how = name, how

    def select(self, step, state):
        shown = getattr(step, self.written)
        if self.how == "shape":
            shown.unsqueeze_(0)
        else:
            shown.zero_()
        return torch.zeros(ROWS, LENGTH, dtype=torch.bool)


def start_with_all(policy, on_error="raise") -> BlockBatch:
    return BlockBatch.start(
        LIKE.clone(),
        [policy] * ROWS,
        mask_token_id=MASK,
        reference=torch.zeros_like(LIKE),
        on_error=on_error,
    )


def test_every_tensor_of_a_step_is_guarded():
    class Looking(Writing):
        def select(self, step, state):
            self.shown = {name for name, value in vars(step).items() if torch.is_tensor(value)}
            return torch.zeros_like(step.masked)

    policy = Looking("", "")
    step(start_with_all(policy))
    assert policy.shown == set(policy_calls._TENSORS)


@pytest.mark.parametrize("name", policy_calls._TENSORS)
def test_a_policy_must_not_write_to_its_inputs(name):
    with pytest.raises(PolicyRuntimeError, match=rf"select failed: changed step\.{name} in place"):
        step(start_with_all(Writing(name, "value")))


@pytest.mark.parametrize("name", ["tokens", "masked", "x0", "confidence", "present"])
def test_another_shape_is_detected_even_if_writes_are_not_counted(name):
    with (
        torch.inference_mode(),
        pytest.raises(PolicyRuntimeError, match=rf"changed the shape of step\.{name}"),
    ):
        step(start_with_all(Writing(name, "shape")))


@pytest.fixture
def log(monkeypatch, caplog):
    monkeypatch.setattr(policy_calls, "_first_failure", Once())
    caplog.set_level(logging.ERROR)
    return caplog


def test_a_failure_is_logged_with_its_cause_and_the_progress_rule(log):
    policy = Policy()
    policy._name = "mine"
    policy.progress = "always_top1"
    error = ValueError("not today")
    for _ in range(2):
        report_failure(policy, "select", error, "progress")
    (record,) = log.records
    assert record.getMessage() == (
        "policy 'mine': select failed; its rows continue with the progress rule 'always_top1': "
        "ValueError: not today"
    )
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    with pytest.raises(PolicyRuntimeError) as got:
        report_failure(policy, "remask", error, "raise")
    assert str(got.value) == "policy 'mine': remask failed: ValueError: not today"
    assert got.value.__cause__ is error


def test_a_breach_of_the_contract_is_logged_with_its_own_message(log):
    report_failure(Policy(), "select", policy_calls.ContractError("returned str"), "progress")
    assert log.records[0].getMessage().endswith("'argmax_if_empty': returned str")


def test_the_number_of_logged_failures_is_bounded(log, monkeypatch):
    monkeypatch.setattr(policy_calls, "_first_failure", Once(2))
    for name in "abca":
        policy = Policy()
        policy._name = name
        report_failure(policy, "select", ValueError("not today"), "progress")
    assert policy_calls._first_failure.seen == {"a", "b"}
    assert len(log.records) == 2


@pytest.mark.parametrize("rule", ["always_top1", "leftmost_if_empty", "no such rule", 4])
def test_a_stand_in_has_the_name_and_progress_rule_of_the_failed_policy(rule, log):
    policy = Policy()
    policy._name, policy.progress = "mine", rule
    policy.requires = frozenset({"logits"})
    runner = stand_in(policy, "init_state", ValueError("not today"), "progress")
    known = rule if rule in ("always_top1", "leftmost_if_empty") else "argmax_if_empty"
    assert (runner.policy.name, runner.policy.progress) == ("mine", known)
    assert runner.traits.progress == known
    assert runner.traits.requires == frozenset()
    assert not (runner.traits.edits or runner.traits.remasks or runner.form)


def test_a_wrong_attribute_is_named():
    policy = Policy()
    policy.progress = "no such rule"
    with pytest.raises(
        PolicyRuntimeError, match=r"policy 'policy': progress failed: .*no such rule"
    ):
        start(policy)


@pytest.mark.parametrize("where", ["init_state", "select"])
def test_a_keyboard_interrupt_is_not_a_failure(where):
    def interrupted(*args):
        raise KeyboardInterrupt

    policy = Policy(first={"a": GOOD})
    policy.__dict__[where] = interrupted
    with pytest.raises(KeyboardInterrupt):
        step(start(policy, "progress"))
