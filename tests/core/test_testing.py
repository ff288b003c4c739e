"""The kit passes a correct policy, and the intended check catches each broken policy."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_plugins.policy_attributes import TraitError, read_traits
from l2pd_plugins.testing import CHECKS, ConformanceError, PolicyConformance, check_policy, suite
from l2pd_plugins.testing.__main__ import main
from l2pd_plugins.testing.broken import (
    CAUGHT_BY,
    FailingLater,
    Misspelt,
    Nameless,
    NeedingAGenerator,
    NeedingMisspelt,
    NeedingText,
    NeedingUnsaid,
    NeverMade,
    NonDeterministic,
    StateBecomesNumber,
    UnannotatedOption,
)
from l2pd_plugins.testing.run import run_check


@pytest.mark.parametrize("broken", CAUGHT_BY, ids=lambda broken: broken.__name__)
def test_a_broken_policy_is_caught_by_the_check_meant_for_it(broken):
    with pytest.raises(ConformanceError) as caught:
        check_policy(broken, block_lengths=(8,), verbose=False)
    said = str(caught.value)
    assert f"\n  {CAUGHT_BY[broken]}: " in said
    assert said.count("\n") < 10
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


@pytest.mark.parametrize("broken", [Misspelt, NeedingText, NeverMade, FailingLater])
def test_a_policy_that_cannot_run_fails_once(broken):
    with pytest.raises(ConformanceError, match=r"^1 of \d+ checks failed; \d+ were skipped, "):
        check_policy(broken, block_lengths=(1, 8))


def test_a_policy_object_is_needed():
    with pytest.raises(ConformanceError, match="the factory made a dict; expected an UnmaskPolicy"):
        check_policy(dict)


def test_the_line_that_failed_is_named():
    with pytest.raises(ConformanceError) as caught:
        check_policy(Misspelt, block_lengths=(8,))
    lines, start = inspect.getsourcelines(Misspelt)
    (at,) = (number for number, line in enumerate(lines, start) if "confidnce" in line)
    assert re.search(
        rf"\n    \S*broken\.py:{at}: return step.masked & \(step.confidnce", str(caught.value)
    )


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (NeedingUnsaid, 'to its requires: requires = frozenset({"entropy", "margin"}) ('),
        (NeedingMisspelt, 'write requires = frozenset({"entropy"}) ('),
        (NeedingText, 'write requires = frozenset({"entropy"}) ('),
        (NeedingAGenerator, "step.generator is None where no seed was given"),
        (UnannotatedOption, "write limit: float = 0.7, or ClassVar[float] for a constant"),
        (StateBecomesNumber, "left state 'best' as float; it began as torch.float32 (3, 8)"),
    ],
)
def test_a_failure_says_what_to_write(broken, words):
    with pytest.raises(ConformanceError, match=re.escape(words)):
        check_policy(broken, block_lengths=(8,))


@pytest.mark.parametrize(
    ("requires", "words"),
    [
        (
            "entropie, margins",
            'is a text, not a set; write requires = frozenset({"entropy", "margin"})',
        ),
        (["entropy"], 'is not a set; write requires = frozenset({"entropy"})'),
        ({"Entropy", "margin"}, "names 'Entropy', which is unknown; write requires = frozenset("),
        ({"mood"}, "names 'mood', which is unknown; expected a set of names out of ahead, "),
        ({7}, "names 7, which is unknown; expected a set of names"),
        ([["entropy"]], "names ['entropy'], which is unknown; expected a set of names"),
        (None, "requires = None is not a set; expected a set of names"),
    ],
)
def test_a_wrong_requires_says_what_to_write(requires, words):
    policy = create_policy("confidence_threshold")
    object.__setattr__(policy, "requires", requires)
    with pytest.raises(TraitError, match=re.escape(words)):
        read_traits(policy)


class Drawing(UnmaskPolicy):
    """Takes each position with the probability of its token."""

    def select(self, step, state):
        if step.generator is None:
            raise L2PDError(f"{self.name} draws positions at random: pass a seed")
        length = step.masked.shape[1]
        drawn = torch.stack([torch.rand(length, generator=each) for each in step.generator])
        return step.masked & (drawn < step.confidence)


def test_a_policy_may_draw_and_ask_for_a_seed():
    assert check_policy(Drawing, block_lengths=(1, 8), verbose=False).passed == list(CHECKS)


@pytest.mark.parametrize("broken", [Misspelt, NonDeterministic, Nameless, NeedingMisspelt])
def test_the_report_of_pytest_is_short_and_whole(broken, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(suite.TestPolicy, "block_lengths", (8,))
    assert main([f"{broken.__module__}:{broken.__name__}"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("\n") <= 25
    with pytest.raises(AssertionError) as caught:
        run_check(CAUGHT_BY[broken], broken, 8)
    assert str(caught.value) in printed
    assert "Traceback" not in printed


def test_the_command_line_runs_any_class(capsys):
    assert main(["l2pd_policies.cora:Cora", "threshold=0.5"]) == 0
    assert f"{len(CHECKS)} passed" in capsys.readouterr().out
    assert main(["l2pd_plugins.testing.broken:Stuck"]) == 1
    assert "test_makes_progress" in capsys.readouterr().out
    assert main(["l2pd_plugins.testing.broken:Nothing"]) == 2
    assert "broken:Nothing" in capsys.readouterr().err
