"""Which rows share a forward pass: those that see about as many columns.

A batch is as wide as its widest row. Once a text has its end, its row sees a short canvas, and
would still pay for the whole one beside a row that goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

PASS = 512
"""What one more forward pass costs, in columns of one row: the launches of its layers, and on a GPU
reading the weights once more."""

CPU_LIMIT = 2048
"""Columns of all rows that a pass on the CPU takes at most, so that a layer's intermediate results
stay in its caches."""


def share_passes(
    first: Sequence[int], last: Sequence[int], limit: int | None = None
) -> list[list[int]]:
    """Split rows, of which row i sees the columns [first[i], last[i]), into groups of row numbers.

    Each group costs its rows times the columns that any of them sees, at most `limit` unless it is
    a single row, plus `PASS`. Rows are grouped in the order of where they end, which gives the
    cheapest split if all begin at the same column.
    """
    order = sorted(range(len(last)), key=lambda row: last[row])
    # Rows that end together are never split for their width, only for the limit.
    units: list[list[int]] = []
    for row in order:
        if limit is None and units and last[units[-1][-1]] == last[row]:
            units[-1].append(row)
        else:
            units.append([row])
    cost = [0] + [0] * len(units)
    start = [0] * (len(units) + 1)
    for end in range(1, len(units) + 1):
        right = last[units[end - 1][0]]
        left, rows = right, 0
        choices: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            left = min(left, *(first[row] for row in units[begin]))
            rows += len(units[begin])
            columns = rows * (right - left)
            if choices and limit is not None and columns > limit:
                break
            choices.append((cost[begin] + PASS + columns, begin))
        cost[end], start[end] = min(choices)
    groups = []
    end = len(units)
    while end:
        groups.append(sorted(row for unit in units[start[end] : end] for row in unit))
        end = start[end]
    return groups[::-1]
