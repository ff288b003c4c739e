"""Statistics of one row of logits by their definitions, in float64, and the checks of a kernel."""

from __future__ import annotations

import math

import pytest
import torch


def logits_of(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random logits (rows, vocabulary), the same at every call."""
    generator = torch.Generator().manual_seed(vocabulary)
    return (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype)


def plain(row: torch.Tensor, suppress: int, token: int = -1) -> list[float]:
    """x0, confidence, entropy and margin of one row; suppress and token are -1 if there is none."""
    z = row.double().clone()
    if suppress >= 0:
        z[suppress] = -torch.inf
    p = z.softmax(-1)
    order = z.sort(descending=True, stable=True).indices.tolist()
    x0 = order[0] if token < 0 else token
    second = float(p[order[1]]) if len(order) > 1 else 0.0
    entropy = float(torch.special.entr(p).sum())
    return [x0, float(p[x0]), entropy, float(p[order[0]]) - second]


ROWS_WITHOUT_NUMBERS = [
    [-math.inf] * 5,
    [1.0, 2.0, math.nan, 3.0, math.nan],
    [math.nan, 2.0, 0.0, 3.0, 1.0],
    [1.0, -math.nan, 0.0, 3.0, 1.0],
    [1.0, 2.0, math.inf, 0.0, math.inf],
    [0.0, math.inf, 1.0, 1.0, 1.0],
    [math.nan, 1.0, math.inf, 2.0, math.nan],
    [-math.inf, 1.0, math.inf, 2.0, 0.0],
    [2.0, 2.0, 2.0, 2.0, 2.0],
    [-math.inf, -math.inf, -math.inf, 0.5, -math.inf],
]
"""Rows of five logits, of which only the last two have statistics."""


def first_prediction(row: list[float], suppress: int) -> tuple[int, bool]:
    """The first NaN, else the first highest value, of the columns that are not suppressed; and
    whether the row has statistics."""
    columns = [i for i in range(len(row)) if i != suppress]
    nan = [i for i in columns if math.isnan(row[i])]
    place = nan[0] if nan else max(columns, key=lambda i: (row[i], -i))
    return place, not nan and math.isfinite(row[place])


def values_of(found, at: int) -> list[float]:
    """The statistics of one row, of a kernel's results."""
    return [float(each[at]) for each in found]


def check_own_statistics(found, logits, rows, tokens, suppress: int) -> None:
    """A kernel's results are those of each of the rows: -1 for a row that is left out, whose values
    are zero, and for a token that is not given."""
    assert [each.dtype for each in found] == [torch.int64, *[torch.float32] * 3]
    places = range(len(logits)) if rows is None else rows.tolist()
    chosen = [-1] * len(places) if tokens is None else tokens.tolist()
    for at, (row, token) in enumerate(zip(places, chosen, strict=True)):
        wanted = [0] * 4 if row < 0 else plain(logits[row], suppress, token)
        assert values_of(found, at) == pytest.approx(wanted, abs=2e-6), (at, row, token)


def check_rows_without_numbers(run, suppress: int) -> None:
    """What a kernel finds in `ROWS_WITHOUT_NUMBERS`. run: (logits, suppress) -> its results."""
    found = run(torch.tensor(ROWS_WITHOUT_NUMBERS), suppress)
    x0, *others = found
    for at, row in enumerate(ROWS_WITHOUT_NUMBERS):
        wanted, sound = first_prediction(row, suppress)
        assert int(x0[at]) == wanted, row
        assert [bool(values[at].isnan()) for values in others] == [not sound] * 3, row
        if sound:
            expected = plain(torch.tensor(row), suppress)
            assert values_of(found, at) == pytest.approx(expected, abs=2e-6)
