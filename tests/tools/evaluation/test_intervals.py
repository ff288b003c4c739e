"""Intervals of shares and of their differences, and how often they hold what they should."""

from __future__ import annotations

from itertools import product
from math import comb, factorial
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.intervals import FEW_DIFFERENCES, share_interval, validity_difference
from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.results import Answer, Evaluation


def scored(valid: list[bool | None], prefix: str = "") -> Evaluation:
    return Evaluation(
        tuple(
            Answer(Prompt(f"{prefix}{i}", str(i)), (1,), (0,), 1, "", value, 1, 0, 0.1)
            for i, value in enumerate(valid)
        ),
        "",
    )


def difference_of(won: int, lost: int, total: int) -> tuple[float, float]:
    """The interval if `won` prompts are right in the first alone, `lost` in the second alone."""
    same = total - won - lost
    first = [True] * won + [False] * lost + [True] * same
    second = [False] * won + [True] * lost + [True] * same
    interval = validity_difference(scored(first), scored(second))
    assert interval is not None and interval.method == "exact"
    return interval.low, interval.high


def test_shares_have_the_published_intervals() -> None:
    # R: binom.test(0, 10), binom.test(4, 4), binom.test(57, 120)
    for count, total, low, high in [
        (0, 10, 0.0, 0.3084971),
        (4, 4, 0.3976354, 1.0),
        (57, 120, 0.3831103, 0.5681527),
    ]:
        assert share_interval(count, total) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_bounds_are_where_the_tails_are_as_likely_as_said(seen: tuple[int, int]) -> None:
    count, total = seen
    low, high = share_interval(count, total, 0.9)

    def at_least(k: int, share: float) -> float:
        terms = (
            comb(total, j) * share**j * (1 - share) ** (total - j) for j in range(k, total + 1)
        )
        return sum(terms)

    assert low == 0 if count == 0 else at_least(count, low) == pytest.approx(0.05)
    assert high == 1 if count == total else at_least(count + 1, high) == pytest.approx(0.95)


@pytest.mark.parametrize("total", [1, 4, 7])
def test_few_prompts_never_give_a_false_certainty(total: int) -> None:
    """Whatever the true shares are, the interval holds their difference 95 times of 100."""
    outcomes = [
        (won, lost, difference_of(won, lost, total))
        for won, lost in product(range(total + 1), repeat=2)
        if won + lost <= total
    ]
    grid = [i / 10 for i in range(11)]
    for p, q in product(grid, repeat=2):
        if p + q > 1:
            continue
        held = sum(
            factorial(total)
            / (factorial(won) * factorial(lost) * factorial(total - won - lost))
            * p**won
            * q**lost
            * max(1 - p - q, 0.0) ** (total - won - lost)
            for won, lost, (low, high) in outcomes
            if low - 1e-9 <= p - q <= high + 1e-9
        )
        assert held >= 0.95 - 1e-9


def test_four_equal_prompts_say_little() -> None:
    low, high = difference_of(0, 0, 4)
    assert low == -high
    assert high > 0.6


def test_nine_losses_of_nine_differences_are_no_accident() -> None:
    low, high = difference_of(0, 9, 30)
    assert low < -0.3 < high < 0


def test_many_differences_give_the_paired_bootstrap() -> None:
    rng = Random(0)
    first = [rng.random() < 0.9 for _ in range(300)]
    second = [x and rng.random() < 0.9 for x in first]
    assert sum(first) - sum(second) >= FEW_DIFFERENCES
    interval = validity_difference(scored(first), scored(second))
    assert interval is not None and interval.method == "paired bootstrap"
    differences = [a - b for a, b in zip(first, second, strict=True)]
    assert interval.difference == pytest.approx(sum(differences) / 300)
    drawn = sorted(sum(rng.choices(differences, k=300)) / 300 for _ in range(4000))
    assert interval.low == pytest.approx(drawn[100], abs=0.011)
    assert interval.high == pytest.approx(drawn[3900], abs=0.011)
    # The interval is narrower than for two evaluations of different prompts.
    assert interval.high - interval.low < 0.1
    assert validity_difference(scored(first), scored(second)) == interval


def test_other_prompts_and_prompts_without_checkers() -> None:
    assert validity_difference(scored([None]), scored([None])) is None
    half = validity_difference(scored([True, None]), scored([False, None]))
    assert half is not None and half.difference == 1
    for other in (scored([True], prefix="x"), scored([True, True])):
        with pytest.raises(L2PDError, match="same prompts"):
            validity_difference(scored([True]), other)
