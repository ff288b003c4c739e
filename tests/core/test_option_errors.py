"""What is said about a wrong option, whatever pydantic calls the error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Literal, get_args

import pytest
from pydantic import Field, field_validator
from pydantic_core.core_schema import ErrorType

from l2pd_plugins.errors import PolicyOptionError
from l2pd_plugins.option_errors import wrong_option
from l2pd_plugins.options import policy_options

PYDANTICS = re.compile(r"ArgsKwargs|[Ii]nput should|[Ff]ield required|Value error|https?://|\n")


CONTEXT = ("gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length", "pattern")


class Colour(Enum):
    RED = "red"


@policy_options
class Declared:
    needed: int
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    half: Annotated[float, Field(ge=0, lt=0.5)] = 0.25
    count: Annotated[int, Field(ge=1)] | None = None
    numbers: Sequence[int] = (1,)
    either: Literal["x", "y"] | Annotated[float, Field(ge=0)] = "x"
    flag: bool = False
    limits: list[Annotated[int, Field(ge=0)]] | None = None
    table: dict[str, int] | None = None
    pair: tuple[int, int] | None = None
    colour: Colour = Colour.RED
    even: int = 2
    text: Annotated[str, Field(min_length=1, max_length=3)] = "a"

    @field_validator("even")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("an even number is needed")
        return value


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("needed", "1", "'1': expected a whole number"),
        ("needed", 1.5, "1.5: expected a whole number"),
        ("needed", True, "True: expected a whole number"),
        ("share", 2, "2: expected a number up to 1"),
        ("share", 0.0, "0.0: expected a number above 0"),
        ("share", float("nan"), "nan: it is NaN; expected a finite number"),
        ("share", float("inf"), "inf: it is infinite; expected a finite number"),
        ("share", float, "<class 'float'>: it is a class, not an object such as float(...); "),
        ("half", 0.5, "0.5: expected a number below 0.5"),
        ("count", 0, "0: expected a number from 1"),
        ("numbers", "12", "'12': expected a list"),
        ("numbers", 5, "5: expected a list"),
        ("numbers", [1, "x"], "[1, 'x']: expected a whole number at index 1"),
        ("either", "z", "'z': expected 'x' or 'y' or a number"),
        ("either", -1.0, "-1.0: expected 'x' or 'y' or a number from 0"),
        ("flag", 1, "1: expected True or False"),
        ("limits", [-1, 2, "q"], "expected a number from 0 at index 0, a whole number at index 2"),
        ("table", [1], "[1]: expected a mapping"),
        ("pair", (1,), "(1,): expected a value at index 1"),
        ("colour", "blue", "'blue': expected an object of the class "),
        ("even", 3, "3: an even number is needed"),
        ("text", "", "'': expected a text of at least 1 characters"),
        ("text", "abcd", "'abcd': expected a text of at most 3 characters"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(option: str, value: object, said: str) -> None:
    with pytest.raises(PolicyOptionError) as caught:
        Declared(**{"needed": 1, option: value})
    message = str(caught.value)
    assert message.startswith(f"Declared: option '{option}' = ") and said in message
    assert not PYDANTICS.search(message)


def test_a_missing_option_is_said_to_be_missing() -> None:
    with pytest.raises(PolicyOptionError) as caught:
        Declared()  # type: ignore[call-arg]
    message = str(caught.value)
    assert message.startswith("Declared: option 'needed' is not given; its options are: needed, ")
    assert not PYDANTICS.search(message)


def test_each_wrong_option_is_named_once() -> None:
    with pytest.raises(PolicyOptionError) as caught:
        Declared(either="z", share=2.0, colr=1)  # type: ignore[call-arg, arg-type]
    message = str(caught.value)
    for option in ("needed", "either", "share", "colr"):
        assert message.count(f"option '{option}'") == 1
    assert "no option 'colr' (given 1); its options are: needed, share" in message


@pytest.mark.parametrize("kind", get_args(ErrorType))
def test_no_error_of_pydantic_is_shown_in_its_own_words(kind: str) -> None:
    context = dict.fromkeys(CONTEXT, 3.0) | {"class": "Colour", "expected": "'a' or 'b'"}
    item = {"type": kind, "loc": ("share",), "msg": "Input should be so", "input": 5}
    said = wrong_option("share", [{**item, "ctx": context}], {"share": 5}, "share")
    assert "'share'" in said and not PYDANTICS.search(said)
    assert said.isprintable() and "5" in said
