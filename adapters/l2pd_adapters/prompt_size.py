"""Prompts that cannot fit into the model are refused by their length in characters.

A server tokenises a prompt while nobody else is answered, and only then compares its length with
the model's: a text of 4 MiB takes a second. No token has more characters than the longest of the
vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from l2pd_plugins.errors import L2PDError


@functools.lru_cache(maxsize=1)
def longest_token(tokenizer: Any) -> int | None:
    """Characters of the longest token of a transformers tokenizer; None without one."""
    return None if tokenizer is None else max(map(len, tokenizer.get_vocab()))


def check_prompt_size(
    body: Mapping[str, Any], positions: int, longest: int | None, *, at_once: bool = False
) -> None:
    """Raise L2PDError for a request whose prompt has more tokens than the model has positions.

    body: the JSON of the request. longest: as from `longest_token`. at_once: whether the server
    tokenises a list of prompts without a pause, so that they count as one.
    """
    messages = body.get("messages")
    if isinstance(messages, list) and len(messages) > positions:
        raise L2PDError(f"messages: {len(messages)} of them; the model reads {positions} tokens")
    if longest is None:
        return
    for name in ("text", "prompt", "system", "messages"):
        value = body.get(name)
        one = at_once or name == "messages"
        each = value if isinstance(value, list) and not one else [value]
        size = max(map(_characters, each), default=0)
        if size > positions * longest:
            raise L2PDError(
                f"{name}: {size} characters; the model reads {positions} tokens, of at most "
                f"{longest} characters"
            )


def _characters(value: Any) -> int:
    """Of all texts in a value of JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
