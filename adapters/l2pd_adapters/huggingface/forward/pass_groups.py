"""Which batch rows share a forward pass: those that attend to about the same number of columns.

A batch is as wide as its widest row. After the end of its text, a row has a shorter canvas; in one
pass with an unfinished row it would still cost as much as the whole canvas.
"""

from __future__ import annotations

from collections.abc import Sequence

PASS = 512
"""Cost of one more forward pass, in columns of one row: launching its layers and, on a GPU, reading
the weights again.
"""

CPU_LIMIT = 2048
"""Greatest number of columns, summed over the rows, of a pass on the CPU, so that a layer's
intermediate results stay in the CPU's caches.
"""


def share_passes(
    first: Sequence[int], last: Sequence[int], limit: int | None = None
) -> list[list[int]]:
    """Split rows into groups of row numbers; row i attends to the columns [first[i], last[i]).

    A group costs its number of rows times the columns to which any of them attends, plus `PASS`;
    the product is at most `limit` unless the group is a single row. Rows are grouped in the order
    of their ends, which gives the cheapest split if all begin at the same column.
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
