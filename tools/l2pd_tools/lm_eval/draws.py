"""Which answers the harness's requests need: it lists a request several times."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance


class Draw(NamedTuple):
    """One of the answers that a request needs."""

    row: int
    """Index of the first equal request."""
    number: int
    """Index among its `repeats` answers."""


def draws_of(requests: Sequence[Instance]) -> list[Draw]:
    """The answer that each request of the list gets.

    The harness lists a request once for each of its answers. It also repeats the last request so
    that all processes have the same number; the copies get the existing answers.
    """
    first: dict[int, int] = {}
    times: Counter[int] = Counter()
    draws = []
    for row, request in enumerate(requests):
        key = id(request)
        draws.append(Draw(first.setdefault(key, row), times[key] % (request.repeats or 1)))
        times[key] += 1
    return draws


def alike(requests: Sequence[Instance], draws: Sequence[Draw]) -> dict[str, list[Draw]]:
    """The distinct draws, grouped by the settings of their requests (as JSON)."""
    groups: dict[str, list[Draw]] = {}
    for draw in dict.fromkeys(draws):
        arguments: Any = requests[draw.row].args
        kwargs = json.dumps(arguments[1], sort_keys=True)
        groups.setdefault(kwargs, []).append(draw)
    return groups
