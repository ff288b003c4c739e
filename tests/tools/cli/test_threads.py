"""How many threads the command line computes with, and how they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CLI = """
import os
from l2pd_tools.cli import main
try:
    main()
finally:
    import torch
    print("threads:", torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY"))
"""


def l2pd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, which says at its end what torch computes with."""
    command = [sys.executable, "-c", CLI, *arguments]
    env = {**os.environ, "COLUMNS": "250", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    ("arguments", "environment", "wanted"),
    [
        (["policies"], {"OMP_NUM_THREADS": "1"}, "1 PASSIVE"),
        (["--threads", "1", "policies"], {"OMP_NUM_THREADS": "2"}, "1 PASSIVE"),
        (["policies"], {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "ACTIVE"}, "1 ACTIVE"),
    ],
)
def test_the_threads_are_those_asked_for_and_wait_passively(
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    wanted: str,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    ended = l2pd(*arguments, **environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.rpartition("threads: ")[2].strip() == wanted


def test_the_help_says_how_many_threads_and_how_to_change_it() -> None:
    help_page = l2pd("--help").stdout
    for words in ("one thread per core", "--threads", "OMP_NUM_THREADS", "torch.set_num_threads"):
        assert words in help_page


def test_no_threads_are_an_error_of_one_line() -> None:
    ended = l2pd("--threads", "0", "policies")
    assert ended.returncode == 2
    assert "--threads" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_library_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = (
        "import os, l2pd_plugins, l2pd_tools.cli, l2pd_adapters.huggingface, l2pd_policies\n"
        "print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert ended.stdout.strip() == "None", ended.stderr


@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_what_make_starts_waits_passively(
    monkeypatch: pytest.MonkeyPatch, given: str | None, wanted: str, tmp_path: Path
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    asking = tmp_path / "asking.mk"
    asking.write_text(f"include {ROOT}/Makefile\nasked:\n\t@echo $$OMP_WAIT_POLICY\n")
    command = ["make", "--no-print-directory", "-C", str(ROOT), "-f", str(asking), "asked"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout.strip() == wanted, ended.stderr
