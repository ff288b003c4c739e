"""Prompts that are too long, before they are tokenised."""

from __future__ import annotations

import json
from typing import Any

import pytest

from l2pd_adapters.prompt_size import check_prompt_size, longest_token
from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins.errors import L2PDError

POSITIONS, LONGEST = 10, 3


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": "", "content": text} for text in texts]}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "x" * 30},
        {"prompt": ["x" * 30] * 20},
        {"prompt": [5] * 100},
        {"text": None, "messages": "x"},
        chat(*["xxx"] * 10),
        {"messages": [{"role": "x", "content": [{"type": "text", "text": "x" * 25}]}]},
    ],
)
def test_what_may_fit_is_left_to_the_engine(body: dict[str, Any]) -> None:
    check_prompt_size(body, POSITIONS, LONGEST)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"text": "x" * 31}, "text: 31 characters; the model reads 10 tokens"),
        ({"prompt": ["x", "x" * 31]}, "prompt: 31 characters"),
        ({"system": "x" * 31}, "system: 31 characters"),
        (chat(*["xxxx"] * 8), "messages: 32 characters"),
        ({"messages": [{"content": [{"text": "x" * 31}]}]}, "messages: 31 characters"),
        (chat(*[""] * 11), "messages: 11 of them"),
    ],
)
def test_what_cannot_fit_is_refused(body: dict[str, Any], said: str) -> None:
    with pytest.raises(L2PDError, match=said):
        check_prompt_size(body, POSITIONS, LONGEST)


def test_prompts_that_are_tokenised_at_once_count_as_one() -> None:
    body = {"prompt": ["x" * 16] * 2}
    check_prompt_size(body, POSITIONS, LONGEST)
    with pytest.raises(L2PDError, match="prompt: 32 characters"):
        check_prompt_size(body, POSITIONS, LONGEST, at_once=True)


def test_the_longest_token_of_a_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_of("tiny-sdar")
    written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [*written["model"]["vocab"], *(each["content"] for each in written["added_tokens"])]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert longest_token(tokenizer) == max(map(len, tokens)) > 10
    assert longest_token(None) is None
    check_prompt_size({"text": "x" * 100}, 1, None)
