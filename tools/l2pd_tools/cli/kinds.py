"""The kinds of option values on the command line, and the only place that checks them.

Every option and argument declares a kind, as typer's `parser`. A value is checked twice: its text
when it is parsed, and what it names on the disk before the command begins (`examining`). An error
is one line that names the option as it was typed, the value, and what is expected. The bounds are
those of `l2pd_adapters.huggingface.checking`; they are repeated because that module imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import typer

from l2pd_plugins import L2PDError, writing
from l2pd_plugins.errors import printable
from l2pd_plugins.files import reading, require_file
from l2pd_plugins.policy import normalize_name
from l2pd_tools.evaluation.prompt_sources import (
    HUB,
    HUB_FORM,
    is_hub,
    is_saved_dataset,
    require_datasets,
)

_LONGEST = 80
"""Greatest number of characters of a value in a message."""
_WHOLE = re.compile(r"[+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def quoted(value: object) -> str:
    """A value for a message: as it was typed if it is plain, otherwise its repr."""
    text = str(value)
    plain = text and text.isprintable() and " " not in text
    return printable(text if plain else repr(text), _LONGEST)


class Kind:
    """A set of values. An instance is called with the text of a value, as typer's `parser`."""

    metavar = "TEXT"
    """Placeholder of the value in the help."""
    fixed_text = ""
    """The text of `expected`, where it is the same for every instance."""
    written: tuple[type, ...] = (str,)
    """Types of the value in a TOML file."""
    place: str | None = None
    """"file" or "folder" for input, "new file" or "new folder" for output."""

    @property
    def expected(self) -> str:
        """As in "expected a whole number from 1"."""
        return self.fixed_text

    @property
    def __name__(self) -> str:  # typer reads it of a parser
        return self.metavar

    def __call__(self, text: Any) -> Any:
        if not isinstance(text, str):  # a default
            return text
        try:
            return self.read(text)
        except ValueError as error:
            said = str(error) or f"expected {self.expected}"
            raise typer.BadParameter(f"{quoted(text)}: {said}") from None

    def read(self, text: str) -> Any:
        """The value of a text. Raises ValueError, with a message if `expected` does not say it."""
        raise NotImplementedError

    def examine(self, value: Any, named: str) -> None:
        """Raise L2PDError, which begins with `named` (the option and the value), if what the value
        names is not there, or cannot be written. Nothing is made, changed, or loaded."""


@dataclass(frozen=True)
class Whole(Kind):
    """Whole numbers within bounds."""

    least: int
    most: int
    metavar = "INTEGER"
    written = (int,)

    @property
    def expected(self) -> str:
        return f"a whole number from {self.least} to {self.most}"

    def read(self, text: str) -> int:
        # Check the length first: Python refuses thousands of digits with a different error.
        if not _WHOLE.fullmatch(text) or len(text.lstrip("+-0")) > len(str(self.most)):
            raise ValueError
        if not self.least <= int(text) <= self.most:
            raise ValueError
        return int(text)


@dataclass(frozen=True)
class Number(Kind):
    """Finite numbers within bounds: from `least`, or above it if `open`, and likewise `most`."""

    least: float
    most: float
    open: bool = False
    above: bool = False
    """Whether `least` itself is excluded, and `most` is not."""
    or_zero: bool = False
    """Whether 0 is a value, too."""
    metavar = "NUMBER"
    written = (int, float)

    @property
    def expected(self) -> str:
        if self.open:
            return f"a number above {self.least:g} and below {self.most:g}"
        if self.above:
            return f"a number above {self.least:g}, up to {self.most:g}"
        return "0, or " * self.or_zero + f"a number from {self.least:g} to {self.most:g}"

    def read(self, text: str) -> float:
        if not _DECIMAL.fullmatch(text):
            raise ValueError
        number = float(text)
        if self.or_zero and number == 0 and not Decimal(text):
            return 0.0
        if not self.least <= number <= self.most:
            raise ValueError
        if (number == self.least and (self.open or self.above)) or (
            number == self.most and self.open
        ):
            raise ValueError
        return number


@dataclass(frozen=True)
class OneOf(Kind):
    """One of some words; with `loosely`, compared like names of policies."""

    words: Sequence[str]
    loosely: bool = False

    @property
    def metavar(self) -> str:  # type: ignore[override]
        return "|".join(self.words)

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.words)}"

    def read(self, text: str) -> str:
        for word in self.words:
            if text == word or (self.loosely and normalize_name(text) == normalize_name(word)):
                return word
        raise ValueError


@dataclass(frozen=True)
class Line(Kind):
    """A non-empty, printable text of one line."""

    what: str = "a text of one line"
    spaces: bool = True

    @property
    def expected(self) -> str:
        return self.what

    def read(self, text: str) -> str:
        if not text.strip() or not text.isprintable() or (" " in text and not self.spaces):
            raise ValueError
        return text


@dataclass(frozen=True)
class PromptText(Kind):
    """A prompt: any text that is not blank."""

    fixed_text = "a text"

    def read(self, text: str) -> str:
        if not text.strip():
            raise ValueError("the prompt is empty; expected a text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the prompt is not UTF-8; expected a text") from None
        return text


@dataclass(frozen=True)
class PolicyText(Kind):
    """A policy, as `policy_text.parse_policy` reads it; the value stays a text. Only the name is
    examined: the options need the policy's class, see `needing_torch.policy_of`.
    """

    fixed_text = "NAME[,key=value...]"

    def read(self, text: str) -> str:
        from l2pd_tools.policy_text import read_policy

        read_policy(text)
        return text

    def examine(self, value: str, named: str) -> None:
        from l2pd_plugins.plugins import find_policy
        from l2pd_tools.policy_text import read_policy

        with beginning(named):
            find_policy(read_policy(value)["name"])


@dataclass(frozen=True)
class Sweep(Kind):
    """An option of a policy and values for it; the value stays a text."""

    fixed_text = "OPTION=VALUE,VALUE,..."

    def read(self, text: str) -> str:
        from l2pd_tools.policy_text import parse_values

        try:
            parse_values(text)
        except L2PDError as error:
            raise ValueError(str(error)) from None
        return text


class Name(Kind):
    """A name that stands for a folder, here or on the hub."""

    def read(self, text: str) -> str:
        return Line().read(text)


@dataclass(frozen=True)
class Model(Name):
    """A shipped model, a folder, or a hub id."""

    fixed_text = "a shipped model, a folder, or a hub id (owner/name)"

    def examine(self, value: str, named: str) -> None:
        from l2pd_adapters.checkpoints import resolve_model

        resolve_model(value, named)


@dataclass(frozen=True)
class Adapter(Name):
    """A LoRA adapter: a folder, or a hub id. `needing_torch.require_adapter` reads it."""

    fixed_text = "a folder, or a hub id (owner/name)"


@dataclass(frozen=True)
class Device(Kind):
    """A device of torch, or auto. `needing_torch.require_device` tries it."""

    fixed_text = "cpu, cuda, cuda:N, or auto"

    def read(self, text: str) -> str:
        if not re.fullmatch(r"[a-z]+(:[0-9]{1,4})?", text):
            raise ValueError
        return text


class Place(Kind):
    """A file or a folder, by its name."""

    def read(self, text: str) -> Path:
        if not text:
            raise ValueError
        return Path(text)


class File(Place):
    """A file."""

    metavar = "FILE"
    fixed_text = "a file's name"


class Folder(Place):
    """A folder."""

    metavar = "FOLDER"
    fixed_text = "a folder's name"


@dataclass(frozen=True)
class InFile(File):
    """An input file. A pipe is allowed, since shells pass one for <(command)."""

    dash: bool = False
    """Whether "-" means stdin."""
    place = "file"

    def examine(self, value: Path, named: str) -> None:
        if self.dash and str(value) == "-":
            return
        with reading(f"{named} cannot be read"):
            if not value.is_fifo():
                require_file(value, named)
            if not os.access(value, os.R_OK):
                raise L2PDError(f"{named} cannot be read: Permission denied")


@dataclass(frozen=True)
class PromptSource(Kind):
    """Where prompts are read from: a file or a pipe, stdin (-), a folder that the package
    `datasets` has saved, or a data set of the hub. The value stays a text.
    """

    metavar = "FILE"
    fixed_text = f"a file, a folder of the package datasets, or {HUB_FORM}"
    place = "file"

    def read(self, text: str) -> str:
        if not text or (is_hub(text) and not HUB.fullmatch(text)):
            raise ValueError
        return text

    def examine(self, value: str, named: str) -> None:
        if is_hub(value):
            require_datasets(named)
        elif not os.path.isdir(value):
            InFile(dash=True).examine(Path(value), named)
        elif not is_saved_dataset(Path(value)):
            raise L2PDError(
                f"{named} cannot be read: it is a folder that the package datasets has not saved; "
                f"expected {self.expected}"
            )


@dataclass(frozen=True)
class InFolder(Folder):
    """An input folder; it must exist, unless the command can create it."""

    there: bool = True
    place = "folder"

    def examine(self, value: Path, named: str) -> None:
        with reading(f"{named} cannot be read"):
            exists, is_folder = value.exists(), value.is_dir()
        if exists and not is_folder:
            raise L2PDError(f"{named} cannot be read: it is a file, expected a folder")
        if self.there and not exists:
            raise L2PDError(f"{named} cannot be read: there is no such folder")


@dataclass(frozen=True)
class OutFile(File):
    """An output file, written at the end of the work."""

    place = "new file"

    def examine(self, value: Path, named: str) -> None:
        writing.require_writable(value, named)


@dataclass(frozen=True)
class OutFolder(Folder):
    """An output folder; it and its parents need not exist."""

    place = "new folder"

    def examine(self, value: Path, named: str) -> None:
        writing.require_place_for_folder(value, named)


@contextmanager
def beginning(named: str) -> Iterator[None]:
    """Makes an L2PDError begin with the option and its value."""
    try:
        yield
    except L2PDError as error:
        raise L2PDError(f"{named}: {error}") from error
