"""Policies and sweeps as they are written on a command line or in a page."""

from __future__ import annotations

from typing import Any

from l2pd_plugins import L2PDError


def parse_policy(text: str) -> dict[str, Any]:
    """A policy's config from ``NAME[,key=value...]``; values are YAML scalars.

    Raises L2PDError for what does not read so. Whether there is such a policy, and such an
    option, is for `create_policy` to say.
    """
    try:
        return read_policy(text)
    except ValueError as error:
        raise L2PDError(f"policy {text!r}: {error}") from None


def read_policy(text: str) -> dict[str, Any]:
    """What `parse_policy` returns. Raises ValueError, which does not name the text."""
    name, *pairs = text.split(",")
    config: dict[str, Any] = {"name": name.strip()}
    if not config["name"]:
        raise ValueError("there is no name; expected NAME[,key=value...]")
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{pair!r} does not read key=value")
        if key in config:
            raise ValueError(f"{key!r} is given twice")
        config[key] = _scalar(value, repr(pair))
    return config


def parse_values(text: str) -> tuple[str, list[Any]]:
    """An option and the values to try from ``key=value,value,...``; values are YAML scalars.

    Raises L2PDError for what does not read so.
    """
    key, equals, values = (part.strip() for part in text.partition("="))
    parts = [value.strip() for value in values.split(",")]
    if not (key and equals and all(parts)):
        raise L2PDError(f"{text!r} does not read key=value,value,...")
    try:
        return key, [_scalar(value, repr(value)) for value in parts]
    except ValueError as error:
        raise L2PDError(f"{text!r}: {error}") from None


def _scalar(text: str, what: str) -> Any:
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter for a date that is none, or too many digits
        raise ValueError(f"{what} is no YAML scalar") from None
    if isinstance(value, list | dict | set | tuple):
        raise ValueError(f"{what} is no YAML scalar")
    try:
        # YAML 1.1 takes 1e-3 for a text; nobody who writes it means one.
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
