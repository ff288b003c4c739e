"""What a shell gets that asks `l2pd` to complete a line, as bash and zsh ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from l2pd_plugins import list_policies


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers for the last word of a line; torch must not be imported for it."""
    words = line.split(" ")
    asked = {"_L2PD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": len(words) - 1}
    code = "import sys; sys.modules['torch'] = None; from l2pd_tools.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **{key: str(value) for key, value in asked.items()}},
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("l2pd sco", ["score"]),
        ("l2pd learn2pd co", ["collect", "convert"]),
        ("l2pd compare --by", ["--by-task"]),
        ("l2pd generate --policy confidence_t", ["confidence_threshold"]),
        ("l2pd policies dream_", ["dream_confidence", "dream_entropy", "dream_margin"]),
        ("l2pd tune eb", ["eb_sampler"]),
        ("l2pd generate --model tiny-", ["tiny-llada", "tiny-sdar"]),
        ("l2pd doctor tiny-s", ["tiny-sdar"]),
        ("l2pd generate --cache p", ["prefix"]),
        ("l2pd generate --file pr", []),  # bash offers files
    ],
)
def test_a_word_is_completed(line: str, words: list[str], tmp_path: Path) -> None:
    assert completed(line, tmp_path) == words


def test_every_policy_is_offered_and_a_broken_file_of_defaults_is_no_hindrance(
    tmp_path: Path,
) -> None:
    (tmp_path / "l2pd.toml").write_text("nonsense")
    found = completed("l2pd generate --policy ", tmp_path)
    assert found == [spec.name for spec in list_policies()]


def test_the_script_for_the_shell_is_printed(l2pd) -> None:
    ended = l2pd("--show-completion", "bash")
    assert ended.returncode == 0, ended.stderr
    assert "_L2PD_COMPLETE=complete_bash" in ended.stdout
