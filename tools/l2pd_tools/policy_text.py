"""Parsing policies and sweeps that are written on a command line or in a page."""

from __future__ import annotations

from typing import Any

from l2pd_plugins import L2PDError


def parse_policy(text: str) -> dict[str, Any]:
    """A policy's config from ``NAME[,key=value...]``; values are YAML scalars.

    Raises L2PDError for any other text. `create_policy` checks whether the policy and its options
    exist.
    """
    try:
        return read_policy(text)
    except ValueError as error:
        raise L2PDError(f"policy {text!r}: {error}") from None


def read_policy(text: str) -> dict[str, Any]:
    """As `parse_policy`, but raises ValueError, whose message does not contain the text."""
    name, *pairs = text.split(",")
    config: dict[str, Any] = {"name": name.strip()}
    if not config["name"]:
        raise ValueError("the name is missing; expected NAME[,key=value...]")
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{pair!r} is not of the form key=value")
        if key in config:
            raise ValueError(f"{key!r} is given twice")
        config[key] = _scalar(value, repr(pair))
    return config


def parse_values(text: str) -> tuple[str, list[Any]]:
    """An option and the values to try from ``key=value,value,...``; values are YAML scalars.

    Raises L2PDError for any other text.
    """
    key, equals, values = (part.strip() for part in text.partition("="))
    parts = [value.strip() for value in values.split(",")]
    if not (key and equals and all(parts)):
        raise L2PDError(f"{text!r} is not of the form key=value,value,...")
    try:
        return key, [_scalar(value, repr(value)) for value in parts]
    except ValueError as error:
        raise L2PDError(f"{text!r}: {error}") from None


def _scalar(text: str, what: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError for an invalid date, or too many digits
        raise ValueError(f"{what} is not a YAML scalar") from None
    if isinstance(value, list | dict | set | tuple):
        raise ValueError(f"{what} is not a YAML scalar")
    try:
        # YAML 1.1 reads 1e-3 as a string; it is meant as a number.
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
