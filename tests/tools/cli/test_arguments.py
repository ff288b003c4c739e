"""Every option and argument of every command, with values that it must not take.

The table has a row for each; an option without one fails the test. What is wrong is one line on
stderr that names the option and the value, the exit code is 2, and no model is loaded.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from l2pd_adapters.huggingface import checking
from l2pd_plugins import policy, trajectories
from l2pd_tools.cli import arguments, groups, learn2pd
from l2pd_tools.cli.app import app
from l2pd_tools.training.rounds import recipes
from tests.tools.cli.wrong_values import BASE, FLAGS, TABLE, WITH


def commands(command: Any = None, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by what is typed to reach it; the first is l2pd itself."""
    command = get_command(app) if command is None else command
    inner = getattr(command, "commands", {})
    if not path or not inner:
        yield path, command
    for name, below in inner.items():
        yield from commands(below, f"{path} {name}".strip())


def parameters(command: Any) -> set[str]:
    """The options and arguments of a command that take a value."""
    names = {p.opts[0] if p.opts[0].startswith("-") else p.name for p in command.params}
    return names - FLAGS


def test_every_option_of_every_command_has_its_row() -> None:
    assert {path: parameters(command) for path, command in commands()} == {
        path: set(rows) for path, rows in TABLE.items()
    }
    assert all(values for rows in TABLE.values() for values in rows.values())


CASES = [(path, name) for path, rows in TABLE.items() for name in rows]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with a file and a folder, where whoever loads or begins to work fails."""
    monkeypatch.setattr("l2pd_tools.loading.load_model", _loading)
    monkeypatch.setattr("l2pd_adapters.huggingface.models.load._values", _loading)
    monkeypatch.setattr("torch.set_num_threads", _loading)
    monkeypatch.setattr("l2pd_tools.viewing.live_terminal.terminal", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("mine")
    (tmp_path / "FOLDER").mkdir()
    return tmp_path


def _loading(*_: Any, **__: Any) -> None:
    pytest.fail("the work has begun")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def arguments_of(path: str, name: str, value: str) -> list[str]:
    """The command line with this value of one option or argument."""
    base = list(BASE.get(path, ()))
    value = "a" * 5000 if value == "LONG" else value
    if not name.startswith("--"):
        options = base[1:] if base and not base[0].startswith("--") else base
        return [*path.split(), *options, "--", value]
    if name == "--file":
        base = []
    if name in base:
        at = base.index(name)
        del base[at : at + 2]
    return [*path.split(), *WITH.get(name, ()), f"{name}={value}", *base]


@pytest.mark.parametrize(("path", "name"), CASES, ids=lambda text: text or "l2pd")
def test_a_value_that_must_not_pass_is_refused_before_the_work(
    l2pd, place: Path, path: str, name: str
) -> None:
    if path == "demo":
        pytest.importorskip("gradio")
    if name == "--adapter":
        pytest.importorskip("peft")
    before = contents(place)
    for value in TABLE[path][name]:
        ended = l2pd(*arguments_of(path, name, value), stdin="Hello")
        said = f"{path} {name} {value[:40]!r}: {ended.stdout}{ended.stderr}"
        assert ended.returncode == 2, said
        (line,) = ended.stderr.splitlines() or [""]
        assert line.startswith("error: "), said
        assert name in line or not name.startswith("--"), said
        shown = "a" * 70 if value == "LONG" else value
        assert any(text in line for text in (shown, repr(value)[1:-1])), said
        assert ended.stdout == "", said
        assert contents(place) == before, said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "compare --policy oracle --policy cora --html x --json-file x",
            "--html x: --json-file names the same; expected another file",
        ),
        ("compare --policy oracle --prompts FILE --json-file FILE", "--prompts names the same"),
        ("compare --policy oracle --prompts FILE --json-file ./FOLDER/../FILE", "--prompts names"),
        ("tune cora --plot x.png --json-file x.png", "--plot names the same"),
        ("tune cora --prompts FILE --json-file FILE", "--prompts names the same"),
        ("learn2pd train --out FOLDER --data FOLDER", "--out names the same; expected another"),
    ],
)
def test_nothing_is_written_over_what_another_option_names(
    l2pd, place: Path, line: str, message: str
) -> None:
    ended = l2pd(*line.split())
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert (place / "FILE").read_text() == "mine"


def test_the_seed_of_the_last_prompt_counts(l2pd, place: Path) -> None:
    largest = str(2**63 - 1)
    ended = l2pd("generate", "--temperature", "1", "--seed", largest, stdin="One\nTwo")
    assert ended.returncode == 2
    assert f"--seed {largest}: " in ended.stderr and "2 prompts" in ended.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--top-p 0.9", "--top-p 0.9: nothing is drawn at temperature 0; add --temperature"),
        ("--top-k 5 --temperature 0", "--top-k 5: nothing is drawn at temperature 0"),
        ("--device cpu --device-map auto", "--device cpu and --device-map auto exclude each other"),
    ],
)
@pytest.mark.parametrize(
    "command", ["generate x", "compare --policy cora", "tune cora"], ids=lambda c: c.split()[0]
)
def test_options_that_do_not_go_together(
    l2pd, place: Path, monkeypatch, command: str, line: str, message: str
) -> None:
    ended = l2pd(*command.split(), *line.split())
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_an_option_is_called_by_the_name_that_was_typed(l2pd, place: Path) -> None:
    for name in ("--file", "--prompts"):
        assert f"error: {name} nowhere.txt cannot" in l2pd("generate", name, "nowhere.txt").stderr


def test_a_port_that_is_taken_is_named_before_a_model_is_loaded(l2pd, place: Path) -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = l2pd("demo", "--port", taken.getsockname()[1])
    assert ended.returncode == 2 and "Address already in use" in ended.stderr


def test_pipes_and_devices_may_be_named(place: Path) -> None:
    from l2pd_tools.cli.examining import _examine
    from l2pd_tools.cli.kinds import InFile, OutFile

    os.mkfifo(place / "pipe")
    kinds = {"a": (["--a"], InFile()), "b": (["--b"], OutFile()), "c": (["--c"], OutFile())}
    null = Path("/dev/null")
    _examine(kinds, {"a": place / "pipe", "b": null, "c": null})


def test_the_bounds_are_those_of_the_engine() -> None:
    known = checking.GENERATE["max_new_tokens"]
    assert known == checking.Whole(1, arguments.MOST_POSITIONS)
    assert arguments.MOST_ROWS == checking.MOST_SEQUENCES
    assert arguments.SEEDS_BELOW == checking.SEEDS_BELOW
    assert arguments.TEMPERATURES == checking.TEMPERATURES
    assert tuple(checking._DTYPES) == groups.DTYPES
    assert tuple(trajectories.LABELS) == learn2pd.LABELS
    assert tuple(policy.PROGRESS_RULES) == learn2pd.PROGRESS
    assert tuple(recipes()) == learn2pd.TRAINABLE
    assert groups.PACE < groups.LONGEST_PACE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generat x", "l2pd has no command generat; did you mean l2pd generate?"),
        ("new_policy x", "did you mean l2pd new-policy?"),
        ("collect", "did you mean l2pd learn2pd collect?"),
        ("learn2pd tran", "l2pd learn2pd has no command tran; did you mean l2pd learn2pd train?"),
        ("learn2pd zzz", "its commands are collect, train, familiar, convert"),
        ("zzz", "its commands are generate, chat, compare, tune, "),
        ("generate x --polcy cora", "has no option --polcy; did you mean --policy or --pace?"),
        ("generate x --max_new_tokens 5", "did you mean --max-new-tokens?"),
        ("generate x -model y", "l2pd generate has no option -model; did you mean --model?"),
        ("generate x --gen-length 5", "it is --max-new-tokens N here"),
        ("generate x --steps=5", "it is --policy fixed_schedule,steps=N here"),
        ("generate x --lora y", "it is --adapter FOLDER here"),
        ("generate x --threads 2", "it goes before the command: l2pd --threads"),
        ("--model y generate x", "it goes after the command: l2pd generate --model"),
        ("generate x --zzz", "l2pd generate has no option --zzz; see l2pd generate --help"),
        ("plugins --zzz", "its options are --format, --json, --help"),
        ("generate x --model", "--model: it is given without a value"),
        ("learn2pd train --out x", "l2pd learn2pd train needs --data; see l2pd learn2pd train"),
        ("tune", "l2pd tune needs policy; see l2pd tune --help"),
        ("generate x y", "l2pd generate: got unexpected extra argument"),
        ("generate x --watch=yes", "--watch"),
    ],
)
def test_what_was_meant_is_said(l2pd, place: Path, line: str, message: str) -> None:
    ended = l2pd(*line.split())
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
