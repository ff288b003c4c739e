"""Confidence intervals of shares, and of the difference of two evaluations of the same prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.results import Evaluation

FEW_DIFFERENCES = 20
"""With fewer prompts that only one evaluation got right, the interval of the difference is exact: a
bootstrap would be too narrow, and of no width at all if there is no such prompt.
"""
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A difference of two shares and an interval around it."""

    difference: float
    low: float
    high: float
    level: float
    method: str
    """"exact" or "paired bootstrap"."""


def share_interval(count: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval of a share of which `count` of `total` were seen (Clopper and Pearson,
    Biometrika 26, 1934). It covers the true share at least as often as `level` says; of nothing
    seen it is all shares.
    """
    tail = (1 - level) / 2
    return _lower(count, total, tail), 1 - _lower(total - count, total, tail)


def validity_interval(evaluation: Evaluation) -> tuple[float, float] | None:
    """The exact interval of an evaluation's validity; None if no prompt has a checker."""
    known = [answer.valid for answer in evaluation.answers if answer.valid is not None]
    return share_interval(sum(known), len(known)) if known else None


def agreement_interval(evaluation: Evaluation) -> tuple[float, float] | None:
    """The exact interval of an evaluation's agreement with other answers; None without them."""
    agreement = evaluation.agreement
    if agreement is None or evaluation.reference_answers is evaluation.answers:
        return None
    total = len(evaluation.answers)
    return share_interval(round(agreement * total), total)


def _exact_difference(won: int, lost: int, total: int, level: float) -> tuple[float, float]:
    """The bounds of a difference: how many prompts differ, times by how much more often they are
    won than lost. Each of the two has an exact interval with half of the error.
    """
    level = (1 + level) / 2
    differing = share_interval(won + lost, total, level)
    won_low, won_high = share_interval(won, won + lost, level)
    low, high = 2 * won_low - 1, 2 * won_high - 1
    return low * differing[low < 0], high * differing[high > 0]


def _lower(count: int, total: int, tail: float) -> float:
    """The share at which `count` or more of `total` have the probability `tail`."""
    if count == 0:
        return 0.0
    numbers = np.arange(1, total + 1, dtype=float)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(numbers))])
    seen = np.arange(count, total + 1)
    ways = factorials[total] - factorials[seen] - factorials[total - seen]
    low, high = 0.0, count / total
    for _ in range(60):  # each halves the interval, beyond the precision of a float
        middle = (low + high) / 2
        # Where every answer counts, the last term is 0 * log(1 - middle).
        logs = ways + seen * np.log(middle) + (total - seen) * np.log1p(-middle)
        low, high = (middle, high) if np.exp(logs).sum() < tail else (low, middle)
    return low


def validity_difference(
    first: Evaluation,
    second: Evaluation,
    *,
    level: float = LEVEL,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval | None:
    """How much more often `first` is valid than `second` on the same prompts, as shares.

    Prompts that both got right, or both wrong, do not count for the difference. If fewer than
    `FEW_DIFFERENCES` prompts do, the interval is exact: it holds the true difference at least as
    often as `level` says. Otherwise it is a paired bootstrap: percentiles of the difference under
    resampling of the prompts.

    None if no prompt has a checker. Raises L2PDError if the prompts differ.
    """
    pairs = list(zip(first.answers, second.answers, strict=False))
    if len(first.answers) != len(second.answers) or any(a.prompt != b.prompt for a, b in pairs):
        raise L2PDError("the two evaluations are not of the same prompts")
    won = sum(a.valid is True and b.valid is False for a, b in pairs)
    lost = sum(a.valid is False and b.valid is True for a, b in pairs)
    count = sum(a.valid is not None for a, _ in pairs)
    if not count:
        return None
    difference = (won - lost) / count
    if won + lost < FEW_DIFFERENCES:
        low, high = _exact_difference(won, lost, count, level)
        return Interval(difference, low, high, level, "exact")
    # A prompt's difference is 1, -1 or 0, so resampling prompts means drawing from a multinomial.
    shares = [won / count, lost / count, (count - won - lost) / count]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    differences = (drawn[:, 0] - drawn[:, 1]) / count
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Interval(difference, float(low), float(high), level, "paired bootstrap")
