"""Defaults from l2pd.toml, and `l2pd config`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from l2pd_tools.cli import config_file

PROMPT = "Sort: kjeqz"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in; the user's own file would be next to it."""
    (tmp_path / "work" / "inner").mkdir(parents=True)
    (tmp_path / "l2pd").mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def configuration(ended: Any) -> str:
    assert ended.returncode == 0, ended.stderr
    return ended.stderr.splitlines()[-1]


def test_the_command_line_wins_over_the_folder_and_the_folder_over_the_user(
    l2pd, place, small_model, monkeypatch
) -> None:
    (place.parent / "l2pd" / "l2pd.toml").write_text(
        f'[generate]\nmodel = "{small_model}"\nmax-new-tokens = 24\npolicy = "cora"\n'
    )
    (place / "l2pd.toml").write_text(
        "[generate]\nmax-new-tokens = 16\ntemperature = 1.5\nseed = 7\njson = false\n"
    )
    monkeypatch.chdir(place / "inner")
    said = configuration(l2pd("generate", PROMPT))
    for part in (f"model={small_model}", "policy=cora(", "max_new_tokens=16", "seed=7"):
        assert part in said
    typed = configuration(l2pd("generate", PROMPT, "--max-new-tokens", "8", "--seed", "9"))
    assert "max_new_tokens=8" in typed and "seed=9" in typed and "policy=cora(" in typed


def test_the_list_says_where_each_value_is_from(l2pd, place) -> None:
    users = place.parent / "l2pd" / "l2pd.toml"
    users.write_text('threads = 2\n[generate]\nprompts = "x.txt"\nlimit = 3\n')
    (place / "l2pd.toml").write_text('[generate]\nfile = "y.txt"\n[compare]\npolicy = ["a", "b"]\n')
    # compare's policies do not exist: they are only looked up when the command runs.
    ended = l2pd("config", "--json")
    assert ended.returncode == 0, ended.stderr
    rows = [tuple(row.values()) for row in json.loads(ended.stdout)]
    own = str(place / "l2pd.toml")
    assert sorted(rows) == sorted(
        [
            ("l2pd", "--threads", "2", str(users)),
            ("l2pd generate", "--file", "y.txt", own),
            ("l2pd generate", "--limit", "3", str(users)),
            ("l2pd compare", "--policy", "a, b", own),
        ]
    )
    assert all(word in l2pd("config").stdout for word in ("--threads", "y.txt", own))


def test_without_a_file(l2pd, place) -> None:
    ended = l2pd("config")
    assert ended.returncode == 0
    assert ended.stdout.startswith("No defaults are set by l2pd.toml")
    assert l2pd("config", "--json").stdout == "[]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = ", "cannot be read: Invalid value"),
        ("threads = 'many'", "threads = many: expected a whole number from 1 to 1024"),
        ("threads = 0", "threads = 0: expected a whole number from 1 to 1024"),
        ("threads = true", "threads = True: expected a whole number"),
        ("model = 'x'", "model: l2pd has no option for a file model; expected one of threads"),
        ("[generat]", "[generat]: l2pd has no command generat; did you mean generate?"),
        ("[generate]\nmodle = 'x'", "generate.modle: l2pd generate has no option"),
        ("[generate]\nmax_new_tokens = 3", "did you mean max-new-tokens?"),
        ("[generate]\ntemperature = 'hot'", "generate.temperature = hot: expected 0, or a number"),
        ("[generate]\ntemperature = nan", "generate.temperature = nan: expected 0, or a number"),
        ("[generate]\njson = 1", "generate.json = 1: expected true or false"),
        ("[generate]\npolicy = ['a', 'b']", "generate.policy = \"['a', 'b']\": expected NAME"),
        ("[generate]\nprompt = 'x'", "l2pd generate has no option for a file prompt"),
        ("[generate]\nend-of-text = 'never'", "never: expected one of block, predicted, off"),
        ("[generate.inner]\nx = 1", "[generate.inner]: l2pd generate has no command inner"),
        ("[learn2pd.collect]\nlimit = 1", "learn2pd.collect.limit = 1: expected a whole number"),
        # What is written, listened on, or runs code is not set by a file.
        ("[compare]\njson-file = 'x'", "l2pd compare has no option for a file json-file"),
        ("[learn2pd.train]\nout = 'x'", "l2pd learn2pd train has no option for a file out"),
        ("[learn2pd.train]\nforce = true", "l2pd learn2pd train has no option for a file force"),
        ("[demo]\nhost = '0.0.0.0'", "l2pd demo has no option for a file host"),
        ("[generate]\ntrust-remote-code = true", "no option for a file trust-remote-code"),
        ("version = true", "l2pd has no option for a file version"),
    ],
)
@pytest.mark.parametrize("command", ["config", "policies"])
def test_what_is_wrong_is_one_line_with_the_file(
    l2pd, place, command: str, content: str, message: str
) -> None:
    (place / "l2pd.toml").write_text(content + "\n")
    ended = l2pd(command)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {place / 'l2pd.toml'}")
    assert message in line
    assert ended.stdout == ""


def test_an_error_names_the_file_of_a_value_that_was_not_typed(l2pd, place) -> None:
    (place / "l2pd.toml").write_text('[generate]\nmodel = "tiny-gpt"\n')
    said = f"(--model is set in {place / 'l2pd.toml'})"
    assert said in l2pd("generate", PROMPT).stderr
    assert said not in l2pd("generate", PROMPT, "--model", "tiny-gpu").stderr


def test_training_without_rounds_ignores_defaults_of_collecting(l2pd, place) -> None:
    (place / "l2pd.toml").write_text('[learn2pd.train]\nmodel = "tiny-sdar"\nbatch-size = 3\n')
    ended = l2pd("learn2pd", "train", "--data", "none", "--out", "f")
    assert "none holds no trajectories" in ended.stderr


def test_threads_and_repeated_options(l2pd, place, monkeypatch) -> None:
    given: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", given.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (place / "l2pd.toml").write_text('threads = 3\n[compare]\npolicy = ["cora", "learn3pd"]\n')
    ended = l2pd("compare")
    assert given == [3]
    assert "--policy learn3pd: no policy 'learn3pd'" in ended.stderr
    assert f"(--policy is set in {place / 'l2pd.toml'})" in ended.stderr


def test_a_user_without_a_home_and_a_folder_that_is_gone(l2pd, place, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    gone = place / "inner"
    monkeypatch.chdir(gone)
    gone.rmdir()
    ended = l2pd("config")
    assert ended.returncode == 0 and ended.stdout.startswith("No defaults are set")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_a_file_of_another_user_is_not_used(l2pd, place) -> None:
    file = place / "l2pd.toml"
    file.write_text("nonsense")
    os.chown(file, 12345, 12345)
    ended = l2pd("config")
    assert ended.returncode == 0
    assert ended.stderr == f"warning: {file} is not used: it belongs to another user\n"


def test_every_option_of_a_file_is_one_of_the_command_line() -> None:
    """None of them writes a file, and none loads code."""
    from typer.main import get_command

    from l2pd_tools.cli.app import app

    def all_of(command: Any) -> set[str]:
        inner = getattr(command, "commands", {}).values()
        own = {key for key, _ in config_file._options(command)}
        return own.union(*(all_of(each) for each in inner))

    keys = all_of(get_command(app))
    assert {"model", "policy", "threads", "quiet"} <= keys
    assert not keys & {"out", "folder", "html", "plot", "json-file", "force", "host", "port"}
    assert not [key for key in keys if "code" in key or "trust" in key]


@pytest.mark.parametrize("question", ["--help", "--version"])
def test_a_broken_file_does_not_hide_the_help(l2pd, place, question: str) -> None:
    (place / "l2pd.toml").write_text("nonsense")
    assert l2pd("doctor", "tiny-llada").returncode == 2
    assert l2pd(question).returncode == 0
