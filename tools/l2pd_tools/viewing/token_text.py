"""Readable texts of tokens."""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """The text with control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class TokenTexts(dict[int, str]):
    """The text of each token, as it reads after other tokens; never empty.

    A token that is only a part of a character is shown by its name in the vocabulary.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers drop the space before a single token.
        self._before = tokenizer("a", add_special_tokens=False).input_ids[-1:]

    def __missing__(self, token: int) -> str:
        before, both = (self._decode([*self._before, *ids]) for ids in ([], [token]))
        text = both[len(before) :] if both.startswith(before) else self._decode([token])
        if not text or "\ufffd" in text:
            text = str(self._tokenizer.convert_ids_to_tokens(token) or token)
        self[token] = printable(text)
        return self[token]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
