"""Statistics of one row of logits by their definitions, in float64."""

from __future__ import annotations

import math

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
