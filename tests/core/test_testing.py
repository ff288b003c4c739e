"""The kit passes a correct policy, and the intended check catches each broken policy."""

from __future__ import annotations

import pytest

from l2pd_plugins import create_policy
from l2pd_plugins.testing import CHECKS, ConformanceError, PolicyConformance, check_policy
from l2pd_plugins.testing.__main__ import main
from l2pd_plugins.testing.broken import CAUGHT_BY
from l2pd_plugins.testing.checks import run_check


@pytest.mark.parametrize("broken", CAUGHT_BY, ids=lambda broken: broken.__name__)
def test_a_broken_policy_is_caught_by_the_check_meant_for_it(broken):
    with pytest.raises(ConformanceError) as caught:
        check_policy(broken, block_lengths=(8,), verbose=False)
    assert f"\n  {CAUGHT_BY[broken]}: " in str(caught.value)
    with pytest.raises(AssertionError):
        run_check(CAUGHT_BY[broken], broken, 8)


class TestThreshold(PolicyConformance):
    def make_policy(self):
        return create_policy("confidence_threshold")


def test_the_base_class_has_every_check():
    assert {f"test_{name}" for name in CHECKS} <= set(dir(PolicyConformance))


def test_the_report_names_what_was_checked(capsys):
    report = check_policy(lambda: create_policy("cora"), block_lengths=(4,))
    assert report.passed == list(CHECKS)
    printed = capsys.readouterr().out
    assert [name for name in CHECKS if name not in printed] == []
    assert report.microseconds > 0


def test_the_command_line_runs_any_class(capsys):
    assert main(["l2pd_policies.cora:Cora", "threshold=0.5", "-q"]) == 0
    assert f"{len(CHECKS)} passed" in capsys.readouterr().out
    assert main(["l2pd_plugins.testing.broken:Stuck", "-q"]) == 1
    assert "test_makes_progress" in capsys.readouterr().out
    assert main(["l2pd_plugins.testing.broken:Nothing"]) == 2
    assert "broken:Nothing" in capsys.readouterr().err
