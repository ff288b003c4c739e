"""Plays a newcomer: `python -m tests.newcomer`.

Builds the wheel, installs it into a new environment, runs every command of README.md and docs/ that
needs no network, compares what it prints with what the page shows, looks at the output in terminals
of three widths and in a pipe, and makes the mistakes that newcomers make. The packages that the
wheel requires are those of this environment, so that nothing is downloaded. The Python examples of
the pages are run by tests/test_readme.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from l2pd_plugins import list_policies
from tests.fresh_environment import INSTALLED, build_wheel, environment, install, link_packages
from tests.newcomer.pages import commands
from tests.newcomer.refusals import FAILING, KIT, REFUSED, write_files
from tests.newcomer.terminal import run_in_terminal, table_in, widest

PARTS = ("pages", "terminals", "mistakes")
WIDTHS = (40, 80, 120)
TABLES = (
    "l2pd policies",
    "l2pd plugins",
    "l2pd compare --limit 2 --policy confidence_threshold --policy eb_sampler",
)
"""Commands that print a table, which fits the terminal."""
TEXTS = ("l2pd doctor tiny-llada", 'l2pd generate "Sort: kjeqz" --trace')
"""Commands that print lines of text, which the terminal wraps."""
MOST_LINES_OF_THE_KIT = 25


@dataclass
class Newcomer:
    """A new environment, the folder in which the commands run, and what went wrong there."""

    python: Path
    folder: Path
    wrong: list[str] = field(default_factory=list)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of a shell in which the environment is active."""
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return {
            **kept,
            "PATH": f"{self.python.parent}{os.pathsep}{kept['PATH']}",
            "COLUMNS": "80",
            "HF_HUB_OFFLINE": "1",
        }

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Print what is tried, for how long it took, and what went wrong."""
        start, before = time.monotonic(), len(self.wrong)
        yield
        state = "ok    " if len(self.wrong) == before else "FAILED"
        print(f"{state} {time.monotonic() - start:6.1f} s  {what}", flush=True)
        for told in self.wrong[before:]:
            print(f"    {told}".replace("\n", "\n    "), flush=True)

    def run(self, words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        """Run a command as in a pipe. pip installs a folder without asking an index; so not with
        -e, which needs a package of its own.
        """
        if words[:2] == ("pip", "install"):
            try:
                install(self.python, self.folder / words[-1].partition("[")[0])
            except RuntimeError as error:
                return subprocess.CompletedProcess(words, 1, "", str(error))
            return subprocess.CompletedProcess(words, 0, "", "")
        command = ("python", "-m", *words) if words[0] == "pytest" else words
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            executable=self.python if command[0] == "python" else None,
        )

    def follow_the_pages(self, only: str | None) -> None:
        """Run the commands in the order of the pages; each page may use files of earlier ones."""
        for command, left_out in commands():
            what = f"{command.page}: {command.text}"
            if only is not None and only not in what:
                continue
            if left_out is not None:
                print(f"-      {left_out}: {what}")
                continue
            with self.trying(what):
                if command.printed is not None or "--watch" in command.words:
                    code, shown = run_in_terminal(command.words, 80, self.folder, self.variables)
                    done = subprocess.CompletedProcess(command.words, code, shown, "")
                else:
                    done = self.run(command.words)
                # A new package's tests fail until its author has written the summary.
                wanted = 1 if command.words[0] == "pytest" else 0
                if done.returncode != wanted:
                    self.wrong.append(f"exit code {done.returncode}: {done.stdout}{done.stderr}")
                elif wanted and "1 failed" not in done.stdout:
                    self.wrong.append(f"more than the summary fails:\n{done.stdout}")
                elif difference := command.difference(done.stdout):
                    self.wrong.append(difference)

    def look_at_terminals(self) -> None:
        """Tables fit the terminal, no name is broken, and a pipe gets no escape sequences."""
        names = [spec.name for spec in list_policies() if spec.origin.startswith("l2pd-plugins:")]
        for text in (*TABLES, *TEXTS):
            words = shlex.split(text)
            expected = names if text == "l2pd policies" else [n for n in names if n in words]
            for width in WIDTHS:
                with self.trying(f"{width} columns: {text}"):
                    code, shown = run_in_terminal(words, width, self.folder, self.variables)
                    self._judge(code, shown, expected)
                    if text in TABLES and (found := widest(table_in(shown))) > width:
                        self.wrong.append(f"a line has {found} columns:\n{shown}")
            with self.trying(f"piped: {text}"):
                done = self.run(tuple(words))
                self._judge(done.returncode, done.stdout, expected)
                if "\x1b" in done.stdout:
                    self.wrong.append("escape sequences in a pipe")

    def _judge(self, code: int, shown: str, expected: list[str]) -> None:
        table = "\n".join(table_in(shown))
        missing = [name for name in expected if name not in table]
        if code or missing:
            self.wrong.append(f"exit code {code}, broken names {missing}:\n{shown}")

    def make_mistakes(self) -> None:
        """A wrong input gives one line that names it; a broken policy a short report."""
        write_files(self.folder)
        for words, named in REFUSED:
            with self.trying(shlex.join(words)):
                done = self.run(words)
                lines = done.stderr.strip().splitlines()
                last = lines[-1] if lines else ""
                if done.returncode != 2 or "Traceback" in done.stderr or named not in last:
                    self.wrong.append(f"exit code {done.returncode}: {done.stdout}{done.stderr}")
        for name, said in FAILING:
            words = (*KIT, f"l2pd_plugins.testing.broken:{name}")
            with self.trying(shlex.join(words)):
                done = self.run(words)
                many = done.stdout.count("\n") > MOST_LINES_OF_THE_KIT
                if done.returncode != 1 or said not in done.stdout or many:
                    self.wrong.append(f"exit code {done.returncode}: {done.stdout}{done.stderr}")


def main() -> int:
    """Do everything; returns 1 if anything went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.newcomer", description=__doc__)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", help="of the commands of the pages, those with this text")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as name:
        root = Path(name)
        own = ("l2pd", "__editable__", "~")
        others = (each for each in os.listdir(INSTALLED) if not each.startswith(own))
        link_packages(others, root / "packages")
        (root / "wheel").mkdir()
        python = environment(root / "venv", build_wheel(root / "wheel"), root / "packages")
        (root / "work").mkdir()
        newcomer = Newcomer(python, root / "work")
        if "pages" in asked.parts:
            newcomer.follow_the_pages(asked.only)
        if "terminals" in asked.parts:
            newcomer.look_at_terminals()
        if "mistakes" in asked.parts:
            newcomer.make_mistakes()
    print(f"{len(newcomer.wrong)} findings")
    return bool(newcomer.wrong)


if __name__ == "__main__":
    sys.exit(main())
