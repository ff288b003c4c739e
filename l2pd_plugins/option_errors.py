"""What pydantic finds wrong with an option, in the words of our other messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l2pd_plugins.errors import describe_error, printable
from l2pd_plugins.shown_values import remark, shown

_WANTED = {
    "bool_type": "True or False",
    "callable_type": "a function",
    "dict_type": "a mapping",
    "enum": "{expected}",
    "finite_number": "a finite number",
    "float_type": "a number",
    "frozen_set_type": "a set",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number from {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "is_instance_of": "an object of the class {class}",
    "is_subclass_of": "a subclass of {class}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number up to {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a mapping",
    "missing": "a value",
    "multiple_of": "a multiple of {multiple_of}",
    "none_required": "None",
    "path_type": "a path",
    "sequence_str": "a list",
    "set_type": "a set",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "string_too_long": "a text of at most {max_length} characters",
    "string_too_short": "a text of at least {min_length} characters",
    "string_type": "a text",
    "too_long": "at most {max_length} elements",
    "too_short": "at least {min_length} elements",
    "tuple_type": "a list",
}
"""What is expected, by pydantic's types of errors."""


def wrong_option(
    name: str | None, items: Sequence[Any], given: Mapping[str, Any], known: str
) -> str:
    """What is wrong with one option.

    Args:
        name: None for what is wrong with the options together.
        items: pydantic's details of it; several if the option has several types.
        given: the options with their values.
        known: the names of all options.
    """
    kind = items[0]["type"]
    if kind == "unexpected_keyword_argument" and name is not None:
        return f"no option {shown(name)} (given {shown(given.get(name))}); its options are: {known}"
    if kind == "missing" and name not in given:
        return f"option {shown(name)} is not given; its options are: {known}"
    raised = [item["ctx"]["error"] for item in items if "error" in item.get("ctx", {})]
    if raised:
        said = describe_error(raised[0], named=False)
    else:
        wanted = dict.fromkeys(map(_expected, items))
        several = any(type(part) is int for item in items for part in item["loc"])
        said = "expected " + (", " if several else " or ").join(wanted)
    if name is None or name not in given:
        return said
    return f"option {shown(name)} = {shown(given[name])}: {remark(given[name])}{said}"


def _expected(item: Any) -> str:
    """What one of the option's types expects."""
    kind, context = item["type"], item.get("ctx", {})
    plain = {name: f"{v:g}" if type(v) is float else v for name, v in context.items()}
    wanted = _WANTED.get(kind, f"a valid value ({kind})").format(**plain)
    if context.get("class") == "Sequence":
        wanted = "a list"
    at = "".join(f" at index {part}" for part in item["loc"][1:] if type(part) is int)
    return printable(wanted + at)
