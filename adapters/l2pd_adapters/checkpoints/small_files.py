"""The small files of a checkpoint: settings, chat templates, and the tokenizer's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l2pd_adapters.chat_templates import template_problem
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import (
    is_there,
    path_inside,
    read_object,
    read_text,
    reading,
    require_file,
    whole_number,
)

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt")
"""Tokenizer files, of which a checkpoint needs at least one. Their size is not limited."""
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
)
"""Files with an object of settings, which transformers reads if they exist."""
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a checkpoint's tokenizer."""

    ids: Mapping[str, int] = field(repr=False)

    @property
    def largest(self) -> int:
        """The largest id."""
        return max(self.ids.values(), default=-1)

    def text_of(self, token_id: int) -> str | None:
        """The token of this id; None if there is none."""
        return next((text for text, known in self.ids.items() if known == token_id), None)


def check_files(folder: Path, skip: Iterable[str] = ()) -> None:
    """Check the small files that transformers reads, before it reads them.

    Raises L2PDError if one is not a regular file, leads out of the folder, does not hold an object
    although it must, or is a chat template that cannot be used.
    """
    for name in SETTINGS_FILES:
        if name not in skip and is_there(folder / name):
            values = read_object(path_inside(folder, name), name)
            if name == "chat_template.json":
                _check_template(name, values.get("chat_template"))
    for name in TOKENIZER_FILES:
        if is_there(folder / name):
            require_file(path_inside(folder, name), name)
    more = folder / TEMPLATES
    names = sorted(f"{TEMPLATES}/{file.name}" for file in more.glob("*.jinja"))
    for name in (TEMPLATE, *names):
        if is_there(folder / name):
            _check_template(name, read_text(path_inside(folder, name), name))


def _check_template(name: str, template: object) -> None:
    problem = template_problem(template)
    if problem:
        raise L2PDError(f"{name}: {problem}")


def vocabulary_of(folder: Path, tokenizer_config: Mapping[str, Any]) -> Vocabulary | None:
    """The tokens in tokenizer.json, else those in vocab.json and in the tokenizer's config; None if
    neither file exists.

    Raises L2PDError if a file or the config's added tokens cannot be read.
    """
    if is_there(folder / "tokenizer.json"):
        return Vocabulary(_ids_of_tokenizer(folder))
    if is_there(folder / "vocab.json"):
        return Vocabulary({**_ids_of_vocabulary(folder), **_added_tokens(tokenizer_config)})
    return None


def _ids_of_tokenizer(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    name = "tokenizer.json"
    path = path_inside(folder, name)
    require_file(path, name)
    with reading(f"{name} cannot be read"):
        ids: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    return ids


def _ids_of_vocabulary(folder: Path) -> dict[str, int]:
    ids = read_object(path_inside(folder, "vocab.json"), "vocab.json")
    if not all(whole_number(value, 0, 2**31) for value in ids.values()):
        raise L2PDError("vocab.json must hold token ids, whole numbers from 0")
    return ids


def _added_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, int]:
    added = tokenizer_config.get("added_tokens_decoder") or {}
    entries = added.items() if isinstance(added, dict) else [("", None)]
    tokens = {}
    for number, entry in entries:
        text = entry.get("content") if isinstance(entry, dict) else None
        if not number.isdecimal() or len(number) > 9 or not isinstance(text, str):
            raise L2PDError(
                "tokenizer_config.json: added_tokens_decoder must hold objects with a "
                "'content', by token id"
            )
        tokens[text] = int(number)
    return tokens
