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
    cost = [0] + [0] * len(order)
    start = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        right = last[order[end - 1]]
        left = right
        choices: list[tuple[int, int]] = []
        for begin in range(end - 1, -1, -1):
            left = min(left, first[order[begin]])
            columns = (end - begin) * (right - left)
            if choices and limit is not None and columns > limit:
                break
            choices.append((cost[begin] + PASS + columns, begin))
        cost[end], start[end] = min(choices)
    groups = []
    end = len(order)
    while end:
        groups.append(sorted(order[start[end] : end]))
        end = start[end]
    return groups[::-1]
