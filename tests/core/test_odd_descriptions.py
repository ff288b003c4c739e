"""A policy's description of itself may raise or be anything; the caller continues."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_plugins.errors import PolicyRuntimeError
from l2pd_plugins.policy_attributes import description_of, fingerprint_of, options_of


class Endless:
    def __repr__(self) -> str:
        raise AssertionError("was printed")

    __str__ = __repr__


class Named(UnmaskPolicy):
    """One of its methods returns or raises the given value."""

    def __init__(self, method: str = "", given: Any = None, name: str = "mine") -> None:
        self._name = name
        if method:
            self.__dict__[method] = self.answer
        self.given = given

    def answer(self) -> Any:
        if isinstance(self.given, BaseException):
            raise self.given
        return self.given

    def select(self, step, state):
        return step.masked


ODD = [
    None,
    5,
    b"text",
    [],
    Endless(),
    ValueError("no\nway"),
    SystemExit(3),
    asyncio.CancelledError(),
    AssertionError(Endless()),
]


@pytest.mark.parametrize("given", ODD, ids=lambda given: type(given).__name__)
def test_a_policy_that_cannot_be_described_is_shown_by_its_name(given):
    assert description_of(Named("describe", given)) == "mine(...)"
    assert options_of(Named("options", given)) == {}
    assert description_of(Named("options", given)) == "mine(...)"  # describe() calls options()
    with pytest.raises(PolicyRuntimeError, match=r"policy 'mine': fingerprint failed: ") as raised:
        fingerprint_of(Named("fingerprint", given))
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500
    with pytest.raises(L2PDError, match=r"mine\(\.\.\.\) is a policy object"):
        create_policy(Named("describe", given), threshold=1)


def test_a_name_that_cannot_be_printed_is_escaped():
    assert description_of(Named("describe", None, name="a\n\ud800")) == r"a\n\ud800(...)"
    assert description_of(Named("describe", "a\nb" + "c" * 5000)).startswith(r"a\nbccc")
    assert len(description_of(Named("describe", "c" * 10**6))) < 1100


def test_options_can_be_written_as_json():
    given = {
        "a": 1, "b": [0.5, "x", (True, None)], "path": Path("p"), "tensor": torch.ones(2),
        "endless": Endless(), "deep": [[[[[1]]]]], 5: "no name", "many": list(range(10**6)),
    }  # fmt: skip
    found = options_of(Named("options", given))
    assert json.loads(json.dumps(found)) == found
    assert found.pop("many").startswith("[0, 1, 2") and 5 not in found
    assert found == {
        "a": 1, "b": [0.5, "x", [True, None]], "path": "p", "tensor": "<Tensor>",
        "endless": "<Endless>", "deep": [[["[[1]]"]]],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["learn2pd", "fixed_schedule", "klass", "llada2_edit"])
def test_descriptions_of_ordinary_policies_are_unchanged(name):
    policy = create_policy(name)
    assert description_of(policy) == policy.describe()
    assert options_of(policy) == policy.options()
    assert fingerprint_of(policy) == policy.fingerprint() == ""


def test_a_keyboard_interrupt_is_passed_through():
    for ask, method in ((description_of, "describe"), (options_of, "options"),
                        (fingerprint_of, "fingerprint")):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            ask(Named(method, KeyboardInterrupt()))
