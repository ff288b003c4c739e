"""What options declare about the values that a stranger may send, and how a value is held to it."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from l2pd_plugins.errors import PolicyOptionError
from l2pd_plugins.options import (
    Below,
    Limits,
    Longest,
    OperatorPath,
    UpTo,
    describe,
    policy_options,
)
from l2pd_plugins.plugins import list_policies, load_factory
from l2pd_plugins.shown_values import remark, shown

LIMITS = Limits(block=8, canvas=32, vocabulary=100)


@policy_options
class Declared:
    near: Annotated[int, Field(ge=0), UpTo("block")] = 1
    many: Annotated[int, UpTo("canvas")] | None = None
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    loose: int = 0
    tokens: Annotated[Sequence[Annotated[int, Field(ge=0), Below("vocabulary")]], Longest("canvas")]
    plain: list[float] = Field(default_factory=list)
    how: Literal["a", "b"] = "a"
    flag: bool = False
    file: OperatorPath | None = None
    text: str = ""
    folder: Path | None = None


def plain_function(
    near: Annotated[int, UpTo("block")] = 1, weights: OperatorPath = "", unknown=None
):  # type: ignore[no-untyped-def]
    """A third party's factory that is a function and not a class with declared options."""


def check(name: str, value: object, factory: Callable[..., Any] = Declared) -> None:
    declared = describe(factory)
    assert declared is not None
    declared[name].check(value, LIMITS)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("near", (0, 8)),
        ("many", (32, -100, None)),
        ("share", (0.1, 0.999)),
        ("loose", (100, -100)),
        ("tokens", ([0, 99], [5] * 32)),
        ("plain", ([0.5],)),
        ("how", ("a", "b")),
        ("flag", (True,)),
    ],
)
def test_values_within_the_bounds_pass(name: str, good: tuple[object, ...]) -> None:
    for value in good:
        check(name, value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("near", 9, r"near.* = 9: expected at most 8 \(block\)"),
        ("near", -1, "expected at least 0"),
        ("near", 10**18, "block"),
        ("near", None, "expected a value"),
        ("near", [1], "not a list"),
        ("near", {}, "expected a whole number"),
        ("many", 33, "canvas"),
        ("share", 0, "expected more than 0"),
        ("share", 1, "expected less than 1"),
        ("share", float("nan"), "finite"),
        ("share", float("inf"), "finite"),
        ("loose", 101, "at most 100"),
        ("loose", -101, "at least -100"),
        ("tokens", [100], r"less than 100 \(vocabulary\)"),
        ("tokens", [-1], "at least 0"),
        ("tokens", [2**63], "vocabulary"),
        ("tokens", [1] * 33, "33 elements; expected at most 32"),
        ("tokens", [], "at least one"),
        ("tokens", [[1]], "flat list"),
        ("tokens", [[]], "flat list"),
        ("tokens", [None], "flat list"),
        ("tokens", 5, "expected a list"),
        ("plain", [0.5] * 33, "at most 32"),
        ("how", "a" * 1000, "at most 200 characters"),
        ("how", "c", "expected 'a' or 'b'"),
        ("how", True, "expected 'a' or 'b'"),
        ("near", 1.0, "expected a whole number"),
        ("near", True, "expected a whole number"),
        ("near", "1", "expected a whole number"),
        ("share", True, "expected a number"),
        ("share", "0.5", "expected a number"),
        ("flag", 1, "expected true or false"),
        ("flag", "no", "expected true or false"),
    ],
)
def test_values_outside_the_bounds_are_refused_by_name(name: str, value: object, said: str) -> None:
    with pytest.raises(PolicyOptionError, match=said) as caught:
        check(name, value)
    assert len(str(caught.value)) < 300


def test_which_options_are_for_requests() -> None:
    declared = describe(Declared)
    assert declared is not None
    for name in ("near", "many", "share", "loose", "tokens", "plain", "how", "flag"):
        assert declared[name].for_requests, name
    for name in ("file", "text", "folder"):  # each of them may name a file
        assert not declared[name].for_requests, name


def test_a_third_partys_function_declares_bounds_too() -> None:
    declared = describe(plain_function)
    assert declared is not None
    with pytest.raises(PolicyOptionError, match="block"):
        check("near", 9, plain_function)
    assert not declared["weights"].for_requests
    assert not declared["unknown"].for_requests  # its bounds are not known


def test_options_that_cannot_be_described() -> None:
    def anything(**given: object) -> None: ...

    assert describe(anything) is None


@pytest.mark.parametrize("spec", list_policies(), ids=lambda spec: spec.name)
def test_every_integer_and_list_of_an_installed_policy_is_bounded(spec: Any) -> None:
    for option in (describe(load_factory(spec)) or {}).values():
        if "list" in option.kinds:
            assert option.longest is not None, option
        elif "whole" in option.kinds and spec.origin.startswith("l2pd-plugins:"):
            assert option.at_most is not None or option.below is not None, option


def test_a_long_list_is_refused_before_it_is_read() -> None:
    class Counting(list):  # type: ignore[type-arg]
        read = 0

        def __iter__(self) -> Any:
            Counting.read += 1
            return super().__iter__()

    for name in ("tokens", "near"):
        with pytest.raises(PolicyOptionError):
            check(name, Counting([1] * 10_000))
    assert Counting.read == 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(values)
def test_every_accepted_value_is_within_its_bounds(value: object) -> None:
    """Whatever it is: either an error of one kind, or a value that is harmless."""
    for name in ("near", "tokens"):
        try:
            check(name, value)
        except PolicyOptionError:
            continue
        if name == "near" and not isinstance(value, str):
            assert 0 <= value <= 8  # type: ignore[operator]
        if name == "tokens":
            assert isinstance(value, list)
            assert len(value) <= 32
            assert all(isinstance(v, str) or 0 <= v < 100 for v in value)


class TestShown:
    @given(values)
    def test_the_text_is_never_long(self, value: object) -> None:
        assert len(shown(value)) <= 200

    def test_short_values_are_shown_whole(self) -> None:
        assert shown([1, 0.5, "a"]) == "[1, 0.5, 'a']"

    def test_values_that_cannot_be_printed_are_shown(self) -> None:
        class Bad:
            def __repr__(self) -> str:
                raise ValueError

        assert "Bad" in shown(Bad())
        assert len(shown(10**10_000)) <= 200
        assert len(shown("\u202e\n" * 1000)) <= 200

    @pytest.mark.parametrize(
        "value",
        [
            [0] * 10**7,
            type("Listed", (list,), {})([0] * 10**7),
            dict.fromkeys(range(10**6)),
            set(range(10**6)),
            bytes(2**30),
            bytearray(2**28),
            type("Named", (str,), {})("x" * 2**26),
            1 << 10**7,
            {"a": dict.fromkeys(range(10**6)).keys()},
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_the_cost_does_not_grow_with_the_value(self, value: object) -> None:
        calls: list[str] = []
        tracemalloc.start()
        sys.setprofile(lambda frame, event, argument: calls.append(event))
        try:
            text = shown(value)
        finally:
            sys.setprofile(None)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert 0 < len(text) <= 200 and text.isprintable()
        assert len(calls) < 1000 and peak < 100_000

    def test_no_code_of_the_value_is_run(self) -> None:
        def never(*args: object, **keywords: object) -> object:
            raise AssertionError("was called")

        methods = ("__repr__", "__str__", "__len__", "__iter__", "__getitem__", "items", "keys")
        for kind, made in ((list, [1]), (dict, {1: 2}), (str, "a"), (bytes, b"a"), (tuple, (1,))):
            value = type("Bad", (kind,), dict.fromkeys(methods, never))(made)
            assert shown(value) == repr(made) and shown([value]) == repr([made])
        for kind, made in ((int, 3), (float, 0.5)):
            assert shown(type("Bad", (kind,), dict.fromkeys(methods, never))(made)) == repr(made)
        meta = type("Meta", (type,), {"__name__": property(never), "__repr__": never})
        other = meta("Bad", (), dict.fromkeys(("__class__", "__repr__"), property(never)))
        assert shown(other()) == "<Bad>"
        assert shown(other) == "<class 'Bad'>"  # the metaclass's name would say nothing
        assert remark(other) == "it is a class, not an object such as Bad(...); "
        value = type("Bad", (float,), dict.fromkeys(("__float__", "__repr__"), never))("nan")
        assert remark(value) == "it is NaN; " and remark(other()) == ""

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (float("nan"), "it is NaN; "),
            (float("-inf"), "it is infinite; "),
            (np.float32("nan"), "it is NaN; "),
            (np.float64("inf"), "it is infinite; "),
            (np.float16("-inf"), "it is infinite; "),
            *((value, "") for value in (1.0, 10**400, "nan", None, True, np.int64(3), [1.0])),
        ],
    )
    def test_nan_and_infinity_are_named(self, value: object, said: str) -> None:
        assert remark(value) == said

    def test_the_remark_about_a_class_is_one_short_line(self) -> None:
        said = remark(type("X\n" * 1000, (), {}))
        assert len(said) < 200 and said.isprintable() and said.endswith("(...); ")

    def test_deep_nesting_and_cycles_are_shown(self) -> None:
        deep: list[object] = []
        for _ in range(10**5):
            deep = [deep]
        assert shown(deep) == "[[[[...]]]]"
        deep[0] = deep
        assert shown(deep) == "[[[[...]]]]"
        broad: object = 1
        for _ in range(4):
            broad = [broad] * 100
        assert len(shown(broad)) <= 200

    @pytest.mark.parametrize(
        "value",
        [None, True, 1.5, -7, "it's", b"a\x00", (1,), (), {1, 2}, {"a": [1]}, frozenset({3}), 1j,
         range(3), range(0, 9, 2), set(), [float("inf")], Path("a"), torch.float16,
         torch.device("cpu")],
        ids=repr,
    )  # fmt: skip
    def test_small_values_are_shown_as_python_shows_them(self, value: object) -> None:
        assert shown(value) == repr(value)

    def test_the_middle_of_a_long_text_is_left_out(self) -> None:
        text = shown("a" * 500 + "b" * 500)
        assert text.startswith("'aaa") and text.endswith("bbb'")
        assert shown(list(range(9))) == "[0, 1, 2, 3, 4, 5, 6, 7, ...]"
        assert shown(list(range(8))) == "[0, 1, 2, 3, 4, 5, 6, 7]"
