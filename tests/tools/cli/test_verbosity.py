"""--quiet and --verbose."""

from __future__ import annotations

import pytest
from typer.main import get_command

from l2pd_tools import progress
from l2pd_tools.cli.app import app
from tests.tools.cli.recorded import collecting

DECODING = ("chat", "compare", "demo", "generate", "score", "tune")


def generating(model, *options: str) -> list[str]:
    return ["generate", "Sort: kjeqz", "--model", str(model), "--max-new-tokens", "8", *options]


def test_every_command_that_decodes_or_trains_has_both() -> None:
    commands = get_command(app).commands
    inner = commands["learn2pd"].commands
    for command in (*(commands[name] for name in DECODING), inner["collect"], inner["train"]):
        names = {name for param in command.params for name in param.opts}
        assert {"--quiet", "-q", "--verbose", "-v"} <= names, command.name


@pytest.mark.parametrize("option", ["--quiet", "-q"])
def test_quiet_prints_nothing_but_results(l2pd, small_model, option: str) -> None:
    usual = l2pd(*generating(small_model))
    ended = l2pd(*generating(small_model, option))
    assert (ended.stdout, ended.stderr) == (usual.stdout, "")
    assert not progress.is_quiet()
    assert len(usual.stderr.splitlines()) == 2


def test_quiet_collecting(l2pd, small_model, prompt_file, tmp_path) -> None:
    ended = l2pd(*collecting(small_model, prompt_file, tmp_path / "d", "--limit", "2", "--quiet"))
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert f"{tmp_path / 'd'}: " in ended.stdout


def test_quiet_still_names_errors(l2pd, tmp_path) -> None:
    ended = l2pd(*generating("tiny-llada", "--quiet", "--policy", "transformer_sampler"))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")


def test_verbose_prints_times_and_where_an_error_arose(l2pd, small_model) -> None:
    lines = l2pd(*generating(small_model, "-v")).stderr.splitlines()
    assert lines[0] == f"loading {small_model}"
    assert any(line.startswith(f"loading {small_model}: ") for line in lines)
    wrong = generating(small_model, "--policy", "transformer_sampler")
    ended = l2pd(*wrong, "--verbose")
    assert ended.returncode == 2
    assert "Traceback" in ended.stderr
    assert ended.stderr.splitlines()[-1] == l2pd(*wrong).stderr.splitlines()[-1]


def test_not_both(l2pd, small_model) -> None:
    ended = l2pd(*generating(small_model, "-q", "-v"))
    assert ended.returncode == 2
    assert ended.stderr == "error: --quiet and --verbose exclude each other; give one\n"
