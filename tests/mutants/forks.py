"""Runs the tests of one module in forked children of a process that has already imported torch.

Each mutant is written into a copy of the tree, and a child of this process imports the package from
there and runs pytest. This takes about a second; a new process would take several.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import coverage
import pytest
from hypothesis import Phase, settings

PATHS = ("", "policies", "adapters", "tools")
QUICK = 0.05
"""Seconds below which a test is quick: all cases of quick tests run first."""
FIRST = 4
"""The number of tests that run separately before the others."""
MEMORY = 16 << 30
"""Bytes of address space that a child may allocate in addition."""
ARGUMENTS = ["-q", "-x", "--no-header", "--tb=no"]
for _plugin in ("cacheprovider", "unraisableexception", "threadexception"):
    # The last two collect garbage several times, which takes as long as the tests of most mutants.
    ARGUMENTS += ["-p", f"no:{_plugin}"]


@dataclass
class Learned:
    """The results of running the tests on the unchanged module."""

    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds of every test, including its child processes."""
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """The lines that each test runs, for each module by its path."""
    failed: list[str] = field(default_factory=list)
    killers: Counter[str] = field(default_factory=Counter)
    """How many mutants each test was the first to detect."""

    def tests_of(
        self, module: str, lines: tuple[int, int] | None, unseen: str, also: tuple[str, ...]
    ) -> list[str]:
        """The tests that run one of these lines, or all tests if lines is None.

        If no test was seen to run them, the tests whose names contain `unseen`. Tests whose names
        contain a word of `also` are added. The tests that have detected most mutants come first,
        then the quick ones. The others are ordered so that one case of every test comes before a
        second.
        """
        last = [test for test in self.seconds if any(word in test for word in also)]
        first, end = lines or (0, -1)
        found = [
            test
            for test, seen in self.lines.items()
            if any(first <= n <= end for n in seen.get(module, ()))
        ]
        if not found:
            found = [test for test in self.seconds if lines is None or unseen in test]
        found = sorted(set(found) - set(last), key=lambda test: (self.seconds[test], test))
        cases: Counter[str] = Counter()
        turn = {}
        for test in found:
            function = test.partition("[")[0]
            turn[test] = 0 if self.seconds[test] < QUICK else 1 + cases[function]
            cases[function] += 1
        # The sort is stable: within a turn the quickest test stays first.
        return sorted(found, key=lambda test: (-self.killers[test], turn[test])) + last

    def within(self, tests: list[str], seconds: float) -> list[str]:
        """As many of the first tests as fit into this time together; at least one."""
        spent = accumulate(self.seconds[test] for test in tests)
        return [
            test
            for i, (test, at) in enumerate(zip(tests, spent, strict=True))
            if not i or at <= seconds
        ]


class Tree:
    """A copy of the repository's files, in which modules are mutated."""

    def __init__(self, origin: Path, copy: Path) -> None:
        self.origin, self.copy = origin, copy
        self._learned: dict[tuple[str, ...], Learned] = {}
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=origin,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (origin / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin / name, copy / name)

    def learn(self, modules: list[str], tests: list[str]) -> Learned:
        """Run these test files once on the unchanged modules."""
        if tuple(tests) not in self._learned:
            self._learned[tuple(tests)] = self._learn(modules, tests)
        return self._learned[tuple(tests)]

    def _learn(self, modules: list[str], tests: list[str]) -> Learned:
        report = self.copy / "learned.json"
        report.unlink(missing_ok=True)
        how = self._fork(lambda: self._watch(modules, tests, report), seconds=1200)
        if not report.exists():
            raise SystemExit(f"{' '.join(tests)} could not be run ({how})")
        found = json.loads(report.read_text())
        for name in found.pop("imported"):  # imported here, so that every child has them
            with suppress(Exception):
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # so that no child's garbage collection scans the objects of this process
        return Learned(**found)

    def survives(
        self, module: str, source: str, tests: list[str], seconds: float
    ) -> tuple[str, str | None]:
        """How the tests end with this source of the module ("survived", "killed" or "timeout"), and
        the first test that failed."""
        noticed = self.copy / "noticed.txt"
        noticed.unlink(missing_ok=True)
        path = self.copy / module
        kept = path.with_suffix(".kept")  # with its time stamp, by which Python finds its bytecode
        os.replace(path, kept)
        try:
            path.write_text(source)
            how = self._fork(lambda: self._run(tests, noticed), seconds)
        finally:
            os.replace(kept, path)
        return how, noticed.read_text() if noticed.exists() else None

    def _fork(self, work: Callable[[], int], seconds: float) -> str:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.setsid()
                signal.alarm(int(seconds) + 1)  # ends the process, whatever it does
                self._enter()
                code = work()
            except BaseException:  # noqa: BLE001 - a child never returns into the parent's code
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        with suppress(ProcessLookupError):  # processes that the tests have started
            os.killpg(child, signal.SIGKILL)
        if os.WIFSIGNALED(status):
            return "timeout" if os.WTERMSIG(status) == signal.SIGALRM else "killed"
        code = os.WEXITSTATUS(status)
        return "survived" if code == 0 else "killed"

    def _enter(self) -> None:
        """Make the child run in the copy."""
        log = os.open(self.copy / "child.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        room = _address_space() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        roots = [str(self.copy / part).rstrip("/") for part in PATHS]
        own = {str((self.origin / part).resolve()) for part in PATHS} | {""}
        sys.path[:] = [*roots, *(p for p in sys.path if p not in own)]
        os.environ["PYTHONPATH"] = os.pathsep.join(roots)
        os.environ["NUMBA_CACHE_DIR"] = str(self.copy / "numba")
        os.environ["TMPDIR"] = str(self.copy / "tmp")
        (self.copy / "tmp").mkdir(exist_ok=True)
        os.chdir(self.copy)

    def _run(self, tests: list[str], noticed: Path) -> int:
        sys.dont_write_bytecode = True
        # The first few tests run separately, so that only their files are collected.
        for part in filter(None, (tests[:FIRST], tests[FIRST:])):
            code = int(pytest.main([*ARGUMENTS, *part], plugins=[_Settings(), _Noticed(noticed)]))
            if code:
                return code
        return 0

    def _watch(self, modules: list[str], tests: list[str], report: Path) -> int:
        before = set(sys.modules)
        watch = _Watch({str(self.copy / module): module for module in modules})
        arguments = [each for each in ARGUMENTS if each != "-x"]
        code = int(pytest.main([*arguments, *tests], plugins=[_Settings(), watch]))
        imported = [
            name
            for name in sys.modules
            if name not in before and not name.startswith(("l2pd_", "tests", "test_", "conftest"))
        ]
        found = {
            "seconds": watch.seconds,
            "lines": watch.lines(),
            "failed": watch.failed,
            "imported": imported,
        }
        report.write_text(json.dumps(found))
        return code


class _Settings:
    """Hypothesis settings: the same examples in every run; failing ones are not minimised."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makemodule(self) -> None:
        # After the conftest, whose profile it extends, and before the tests are decorated.
        settings.register_profile(
            "mutants",
            settings(),
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
        )
        settings.load_profile("mutants")


class _Noticed:
    """Records which test has failed, and ends the process."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._file.write_text(report.nodeid)
            os._exit(1)


class _Watch:
    """Times every test and records which lines of some files it runs."""

    def __init__(self, files: dict[str, str]) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self._files = files
        self._coverage = coverage.Coverage(data_file=None, include=list(files))
        self._coverage.start()

    def lines(self) -> dict[str, dict[str, list[int]]]:
        """The lines that each test runs in each module, after all tests have run."""
        self._coverage.stop()
        found: dict[str, dict[str, list[int]]] = {test: {} for test in self.seconds}
        data = self._coverage.get_data()
        for file, module in self._files.items():
            for line, tests in data.contexts_by_lineno(file).items():
                for test in filter(None, tests):
                    found[test].setdefault(module, []).append(line)
        return found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        start = sum(os.times()[:4])
        self._coverage.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self._coverage.switch_context("")
            self.seconds[item.nodeid] = sum(os.times()[:4]) - start

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def count(outcomes: Iterable[str]) -> Counter[str]:
    """How many mutants ended in each way."""
    return Counter(outcomes)
