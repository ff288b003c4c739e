"""Confidence interval of the difference of two evaluations: a paired bootstrap over the prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l2pd_plugins import L2PDError
from l2pd_tools.evaluation.results import Evaluation


@dataclass(frozen=True)
class Interval:
    """A difference of two shares and a bootstrap interval around it."""

    difference: float
    low: float
    high: float
    level: float


def validity_difference(
    first: Evaluation,
    second: Evaluation,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval | None:
    """How much more often `first` is valid than `second` on the same prompts, as shares.

    The interval is a paired bootstrap over the prompts: percentiles of the difference under
    resampling. None if no prompt has a checker. Raises L2PDError if the prompts differ.
    """
    pairs = list(zip(first.answers, second.answers, strict=False))
    if len(first.answers) != len(second.answers) or any(a.prompt != b.prompt for a, b in pairs):
        raise L2PDError("the two evaluations are not of the same prompts")
    won = sum(a.valid is True and b.valid is False for a, b in pairs)
    lost = sum(a.valid is False and b.valid is True for a, b in pairs)
    count = sum(a.valid is not None for a, _ in pairs)
    if not count:
        return None
    # A prompt's difference is 1, -1 or 0, so resampling prompts means drawing from a multinomial.
    shares = [won / count, lost / count, (count - won - lost) / count]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    differences = (drawn[:, 0] - drawn[:, 1]) / count
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return Interval((won - lost) / count, float(low), float(high), level)
