"""Each wrong input gives one line that names what was typed, before any work.

`tests/tools/cli/test_arguments.py` does the same for the values of every option of every command.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l2pd_plugins import L2PDError
from tests.conftest import PluginSite
from tests.wrong_inputs import calls, commands, files, plugins
from tests.wrong_inputs.place import Place, Rows

TABLES = {
    "calls": calls.TABLES,
    "files": files.TABLES,
    "plugins": plugins.TABLES,
    "commands": commands.TABLES,
}
CASES = [
    (kind, table, what)
    for kind, tables in TABLES.items()
    for table, rows in tables.items()
    for what in rows
]
INNER_WORDS = re.compile(r"ArgsKwargs|[Ii]nput should|Traceback|object at 0x")
WAITING = ("importing ", "loading ")
"""The beginnings of the lines that say what a command waits for."""


@pytest.fixture
def here(
    loaded: tuple[Any, Any],
    small_model: Path,
    tmp_path: Path,
    site: PluginSite,
    l2pd: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = loaded
    ids = tokenizer("Sort: ba", return_tensors="pt").input_ids
    return Place(folder, model, tokenizer, small_model, ids, site, l2pd)


def rows_of(kind: str, table: str) -> Rows:
    return TABLES[kind][table]


def said_about(act: Callable[[Place], object], here: Place) -> str:
    """The error's text, or what a command wrote to stderr besides what it waits for."""
    try:
        ended = act(here)
    except L2PDError as error:
        return str(error)
    assert isinstance(ended, subprocess.CompletedProcess), f"it was accepted: {ended!r}"
    assert (ended.returncode, ended.stdout) == (2, "")
    lines = [line for line in ended.stderr.splitlines() if not line.startswith(WAITING)]
    return "\n".join(lines).removeprefix("error: ")


@pytest.mark.parametrize(("kind", "table", "what"), CASES)
def test_a_wrong_input_is_one_line_that_names_it(
    here: Place, kind: str, table: str, what: str
) -> None:
    act, words = rows_of(kind, table)[what]
    hook = here.model.get_decoder().register_forward_pre_hook(
        lambda *_: None if table == "run" else pytest.fail("the model has run")
    )
    try:
        said = said_about(act, here)
    finally:
        hook.remove()
    assert said.isprintable(), f"not one line: {said!r}"
    assert re.search(".*".join(map(re.escape, words.split("..."))), said), said
    assert not INNER_WORDS.search(said)


def test_there_are_enough_of_each_kind() -> None:
    counts = {kind: sum(map(len, tables.values())) for kind, tables in TABLES.items()}
    assert sum(counts.values()) >= 150, counts
    assert all(count >= 20 for count in counts.values()), counts
