"""What prompts are read from: files of several formats, pipes, and data sets of the hub.

A source gives rows, each a text or a mapping of fields; `prompts` makes prompts of them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from l2pd_plugins import L2PDError
from l2pd_plugins.files import decoded, one_line, parse_json, read_object, read_text, reading

FORMATS = ("lines", "jsonl", "json", "csv", "tsv", "parquet")
FORMAT_OF_SUFFIX = {
    ".txt": "lines",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
HUB = re.compile(r"hf://(?:datasets/)?(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[^:/]+))?(?::(.+))?")
"""A data set of the hub: ``hf://OWNER/NAME``, with its configuration and split if it has several:
``hf://OWNER/NAME/CONFIG:SPLIT``."""
HUB_FORM = "hf://OWNER/NAME[/CONFIG][:SPLIT]"
_SPLITS = "dataset_dict.json"
_SAVED = "state.json"
"""Files in a folder that `datasets` has saved: of several splits, or of one."""


class Row(NamedTuple):
    """A row of a source: a text, a mapping of fields, or something that is neither."""

    number: int
    """Its line in the file or its place in the list, from 1."""
    where: str
    """The same for messages: "prompts p.jsonl, line 3"."""
    value: Any


def is_hub(source: object) -> bool:
    """Whether the source is written as a data set of the hub."""
    return isinstance(source, str) and source.startswith("hf://")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` has saved the folder."""
    return any((folder / name).is_file() for name in (_SPLITS, _SAVED))


def require_datasets(called: str) -> None:
    """Raise L2PDError if the package `datasets` is missing. `called`: what needs it."""
    if find_spec("datasets") is None:
        raise L2PDError(f"{called}: needs the package datasets; pip install datasets")


def format_of(path: Path, format: str | None, called: str) -> str | None:
    """The format of a file, by its suffix if none is given; None for a name without a suffix, whose
    content decides. Raises L2PDError for a suffix that has no known format.
    """
    if format is not None:
        return format
    suffix = path.suffix.lower()
    if suffix and suffix not in FORMAT_OF_SUFFIX:
        raise L2PDError(
            f"{called}: the format {suffix} is not known; expected one of "
            f"{', '.join(FORMAT_OF_SUFFIX)}, or its format given (--prompt-format)"
        )
    return FORMAT_OF_SUFFIX.get(suffix)


def rows_of(
    source: str | Path, *, format: str | None = None, limit: int | None = None
) -> Iterator[Row]:
    """The rows of a file, a pipe, a folder that `datasets` has saved, or a data set of the hub.

    Raises L2PDError, with the place, if it cannot be read. `limit`: no more rows than this are
    needed, so that a large data set is not downloaded.
    """
    called = f"prompts {source}"
    if isinstance(source, str) and is_hub(source):
        yield from _numbered(_hub_rows(source, called, limit), called, "row")
        return
    path = Path(source)
    if os.path.isdir(path) and is_saved_dataset(path):
        yield from _numbered(_saved_rows(path, called), called, "row")
        return
    found = format_of(path, format, called)
    if found == "parquet":
        yield from _numbered(_parquet_rows(path, called), called, "row")
    else:
        yield from rows_of_text(_read(path, called), str(source), found)


def rows_of_text(text: str, source: str, format: str | None) -> Iterator[Row]:
    """The rows of a text. Without a format it holds lines, unless it looks like JSON, which is
    refused: a prompt would be a line of it."""
    called = f"prompts {source}"
    if format is None:
        _refuse_json(text, called)
    if format == "json":
        yield from _numbered(_json_items(text, called), called, "item")
    elif format in ("csv", "tsv"):
        yield from _table_rows(text, called, "," if format == "csv" else "\t")
    elif format == "jsonl":
        yield from _json_lines(text.split("\n"), called)
    else:
        yield from text_lines(text.split("\n"), called)


def text_lines(lines: Iterable[str], called: str) -> Iterator[Row]:
    """A row for each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if number == 1:
            line = line.removeprefix("\ufeff")  # a byte order mark
        if line.strip():
            yield Row(number, f"{called}, line {number}", line)


def _json_lines(lines: Iterable[str], called: str) -> Iterator[Row]:
    for number, where, line in text_lines(lines, called):
        yield Row(number, where, _parsed(line, where))


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise L2PDError(f"{where}: not valid JSON: {one_line(error)}") from None


def _json_items(text: str, called: str) -> list[Any]:
    items = _parsed(text, called)
    if not isinstance(items, list):
        raise L2PDError(
            f"{called}: {_kind_of(items)}; expected a list of texts or objects"
            + (" (one object per line is a .jsonl file)" if isinstance(items, dict) else "")
        )
    return items


def _kind_of(value: Any) -> str:
    return "it holds an object" if isinstance(value, dict) else "it holds one value"


def _table_rows(text: str, called: str, delimiter: str) -> Iterator[Row]:
    """The rows of a CSV, by the names in its first line."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            number = reader.line_num
            where = f"{called}, line {number}"
            if None in row or None in row.values():
                count = len(reader.fieldnames or ())
                more = "more" if None in row else "fewer"
                raise L2PDError(f"{where}: it has {more} than {count} cells, as the first line has")
            # An empty cell is a field that is not given.
            yield Row(number, where, {name: cell for name, cell in row.items() if cell})
    except csv.Error as error:
        raise L2PDError(f"{called}, line {reader.reader.line_num}: {one_line(error)}") from None


def _parquet_rows(path: Path, called: str) -> Iterator[Any]:
    if find_spec("pyarrow") is None:
        raise L2PDError(f"{called}: needs the package pyarrow; pip install pyarrow")
    from pyarrow.parquet import ParquetFile

    with reading(f"{called} cannot be read"):
        file = ParquetFile(path)
    with reading(f"{called} cannot be read"), file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _saved_rows(folder: Path, called: str) -> Iterable[Any]:
    if (folder / _SPLITS).is_file():
        names = read_object(folder / _SPLITS, called).get("splits")
        splits = [str(folder / str(name)) for name in names] if isinstance(names, list) else []
        raise L2PDError(f"{called}: it has several splits; name one: {', '.join(splits)}")
    require_datasets(called)
    import datasets

    with reading(f"{called} cannot be read"):
        return datasets.load_from_disk(str(folder))


def _hub_rows(source: str, called: str, limit: int | None) -> Iterator[Any]:
    found = HUB.fullmatch(source)
    if found is None:
        raise L2PDError(f"{called}: expected {HUB_FORM}")
    require_datasets(called)
    import datasets

    name, config, split = found.groups()
    with reading(f"{called} cannot be read"):
        if split is None:
            splits = datasets.get_dataset_split_names(name, config)
            if len(splits) != 1:
                raise L2PDError(f"{called}: it has the splits {', '.join(splits)}; add one, as "
                                f"{source}:{splits[0]}")  # fmt: skip
            split = splits[0]
        streaming = limit is not None and "[" not in split  # a part of a split has to be there
        yield from datasets.load_dataset(name, config, split=split, streaming=streaming)


def _numbered(items: Iterable[Any], called: str, unit: str) -> Iterator[Row]:
    for number, item in enumerate(items, start=1):
        yield Row(number, f"{called}, {unit} {number}", item)


def _read(path: Path, called: str) -> str:
    """The text of a file, which may be a pipe, such as the shell's <(command)."""
    with reading(called):
        is_pipe = path.exists() and stat.S_ISFIFO(path.stat().st_mode)
    if is_pipe:
        with reading(called):
            return decoded(path.read_bytes(), called)
    return read_text(path, called)


def _refuse_json(text: str, called: str) -> None:
    first = next((line for line in text.splitlines() if line.strip()), "").strip()
    if not first.startswith(("{", "[")):
        return
    for part, format in ((first, "jsonl"), (text, "json")):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, Mapping | list):
            format = "json" if isinstance(value, list) and part is text else format
            raise L2PDError(
                f"{called}: it looks like JSON; name its format, as --prompt-format {format}, or "
                "--prompt-format lines to decode each line as it is"
            )
