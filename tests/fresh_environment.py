"""New environments with the built wheel, for which nothing is downloaded."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALLED = Path(sysconfig.get_path("purelib"))
"""The folder of this environment's packages."""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
QUIET = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]


def run(
    *command: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that cannot import packages of this checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)),
        env={**kept, **environment},
        cwd=cwd or tempfile.gettempdir(),
        capture_output=True,
        text=True,
    )


def build_wheel(folder: Path) -> Path:
    """Build the wheel of this checkout into a folder. Raises RuntimeError with pip's message."""
    _run_pip("wheel", *QUIET, "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def environment(folder: Path, wheel: Path, others: Path) -> Path:
    """The Python of a new environment that has the wheel, and the packages in `others`."""
    done = run(sys.executable, "-m", "venv", "--without-pip", folder)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{others}\n")  # the .pth files in it are not read
    python = folder / "bin" / "python"
    install(python, wheel)
    return python


def install(python: Path, *what: str | Path) -> None:
    """Install distributions into an environment, without what they require.

    What it only borrows from this environment is neither taken for installed nor removed.
    """
    _run_pip("--python", python, "install", "--ignore-installed", *QUIET, *what)


def link_packages(names: Iterable[str], folder: Path) -> None:
    """Make these files and folders of the installed packages importable from a folder."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(INSTALLED / name)


def _run_pip(*arguments: str | Path) -> None:
    done = run(*PIP, *arguments)
    if done.returncode:
        raise RuntimeError(done.stderr)
