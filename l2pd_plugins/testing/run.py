"""Running the checks on a policy, and saying what failed and where."""

from __future__ import annotations

import linecache
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from l2pd_plugins.errors import ANY_FAILURE, L2PDError, describe_error
from l2pd_plugins.policy import StatisticNotRequired
from l2pd_plugins.policy_attributes import requires_line
from l2pd_plugins.testing.bench import Bench, Factory
from l2pd_plugins.testing.checks import CHECKS, ESSENTIAL, first_step

BLOCK_LENGTHS = (1, 2, 3, 7, 8, 32, 33, 256)
"""Block lengths of the default run; a policy that is made for one length is tested with that one
only.
"""

_LIBRARIES = {"l2pd_plugins", "torch", "pydantic", *sys.stdlib_module_names}
"""Top-level packages whose lines are not the author's."""
_BROKEN = "l2pd_plugins.testing.broken"


class ConformanceError(AssertionError):
    """A policy breaks the contract; the message names every check that failed, and how."""


@dataclass
class Report:
    """The result of each check."""

    failures: dict[str, str] = field(default_factory=dict)
    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """The checks that were left out since a check that they depend on failed."""
    microseconds: float = 0.0
    """Median time of a `select` for 8 blocks, on this machine."""


def run_check(name: str, factory: Factory, block_length: int) -> None:
    """Run one check at one block length. Raises AssertionError, with the length, if it fails."""
    try:
        CHECKS[name](Bench(factory, block_length))
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        told = f"{_told(error, factory)} (block_length={block_length})"
        place = _place(error)
        raise AssertionError(f"{told}\n    {place}" if place else told) from error


def failure_of(name: str, factory: Factory, block_lengths: tuple[int, ...]) -> str | None:
    """Why a check fails, at the first block length at which it does; None if it passes."""
    for length in lengths_of(name, block_lengths):
        try:
            run_check(name, factory, length)
        except AssertionError as error:
            return str(error)
    return None


def failing_before(name: str, factory: Factory, block_lengths: tuple[int, ...]) -> str | None:
    """The first essential check before this one that fails, too; None if all pass."""
    names = list(CHECKS)
    earlier = [each for each in ESSENTIAL if names.index(each) < names.index(name)]
    failing = (each for each in earlier if failure_of(each, factory, block_lengths))
    return next(failing, None)


def check_policy(
    factory: Factory, *, block_lengths: tuple[int, ...] = BLOCK_LENGTHS, verbose: bool = True
) -> Report:
    """Run every check on the policies that `factory()` makes.

    Prints a line per check and the time of a `select`, unless `verbose` is False. The longest
    lengths run once each, so that it stays quick.

    Raises ConformanceError, which names the checks that failed. If the policy cannot decode a block
    at all, that is one failure, and the checks after it are skipped.

        check_policy(lambda: create_policy("cora", threshold=0.7))
    """
    report = Report()
    for name in CHECKS:
        if any(each in report.failures for each in ESSENTIAL):
            report.skipped.append(name)
            continue
        failure = failure_of(name, factory, block_lengths)
        if failure is None:
            report.passed.append(name)
        else:
            report.failures[name] = failure
    if report.failures:
        raise ConformanceError(_summary(report))
    report.microseconds = _time(factory, block_lengths)
    if verbose:
        for name, check in CHECKS.items():
            print(f"{name:24} ok  {first_line(check)}")
        print(f"select takes {report.microseconds:.0f} us for 8 blocks")
    return report


def lengths_of(name: str, block_lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The block lengths at which a check runs.

    Checks that decode whole blocks several times would be slow at long lengths; `makes_progress`
    needs enough steps for a policy to build up its history.
    """
    if name == "makes_progress":
        return tuple(n for n in block_lengths if 4 <= n <= 32)
    whole = (
        "can_be_made",
        "names_itself",
        "describes_itself",
        "says_what_it_needs",
        "takes_a_step",
        "ends",
        "state_is_per_row",
        "reads_nothing_back",
        "bears_few_masks",
    )
    if name in whole:
        return block_lengths
    return tuple(n for n in block_lengths if n <= 8) or (min(block_lengths),)


def first_line(check: Callable[[Bench], None]) -> str:
    """What a check verifies, in one line."""
    return (check.__doc__ or "").splitlines()[0]


def _summary(report: Report) -> str:
    counts = f"{len(report.failures)} of {len(CHECKS)} checks failed"
    if report.skipped:
        counts += f"; {len(report.skipped)} were skipped, since they depend on the one that failed"
    lines = (f"\n  {name}: {why}" for name, why in report.failures.items())
    return f"{counts}:{''.join(lines)}"


def _told(error: BaseException, factory: Factory) -> str:
    """What failed, and the line to write if a statistic is not required."""
    for each in _causes(error):
        if isinstance(each, StatisticNotRequired):
            return f"{each}: {requires_line([*factory().requires, each.statistic])}"
    named = not isinstance(error, L2PDError) and type(error) is not AssertionError
    return describe_error(error, named=named)


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and its causes, the first cause first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.insert(0, error)
        error = error.__cause__
    return found


def _place(error: BaseException) -> str | None:
    """File, line and text of the author's innermost line; None if the error began elsewhere."""
    for each in _causes(error):
        for file, number, module in reversed(list(_frames(each))):
            if module == _BROKEN or module.partition(".")[0] not in _LIBRARIES:
                shown = os.path.relpath(file) if file.startswith(f"{os.getcwd()}{os.sep}") else file
                text = linecache.getline(file, number).strip()
                return f"{shown}:{number}: {text}"
    return None


def _frames(error: BaseException) -> Iterator[tuple[str, int, str]]:
    """(file, line, module) of each frame of a traceback, the outermost first."""
    each = error.__traceback__
    while each is not None:
        code = each.tb_frame.f_code
        yield code.co_filename, each.tb_lineno, str(each.tb_frame.f_globals.get("__name__"))
        each = each.tb_next


def _time(factory: Factory, block_lengths: tuple[int, ...]) -> float:
    bench = Bench(factory, 32 if 32 in block_lengths else max(block_lengths))
    policy = bench.policy()
    step = first_step(bench, policy, 8)
    state = policy.init_state(8, bench.length, torch.device("cpu"))
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        policy.select(step, state)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6
