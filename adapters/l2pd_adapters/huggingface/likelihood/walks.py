"""Decoding an answer one token after the other, with the answer's own tokens (the chain rule)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2pd_adapters.huggingface.checking import short
from l2pd_adapters.huggingface.likelihood.passes import Part, PartialPasses, Predictions, padded
from l2pd_plugins.errors import L2PDError

ORDERS = ("left_to_right", "confidence")
Order = str | Sequence[int]
"""One of `ORDERS`, or the positions of an answer in the order in which they are decoded."""


def positions_in(order: Order, parts: Sequence[Part]) -> list[int] | None:
    """The positions of an answer in this order; None for the order of confidence."""
    count = sum(part.length for part in parts)
    listed: Any = order.tolist() if isinstance(order, Tensor | np.ndarray) else order
    if listed == "confidence":
        return None
    if listed == "left_to_right":
        return list(range(count))
    numbers = isinstance(listed, list | tuple) and all(type(each) is int for each in listed)
    if not numbers or sorted(listed) != list(range(count)):
        raise L2PDError(
            f"order={short(order)}: expected one of {', '.join(ORDERS)}, or the positions 0 to "
            f"{count - 1} of the answer, each once"
        )
    positions: list[int] = list(listed)
    begin = 0
    for part in parts:
        inside = positions[begin : begin + part.length]
        begin += part.length
        if max(inside) >= begin:
            raise L2PDError(
                f"order={short(order)}: position {max(inside)} is in a later block than others "
                "that follow it; a block-causal model decodes its blocks from left to right"
            )
    return positions


@dataclass
class _Walk:
    """An answer whose tokens are decoded one after the other."""

    parts: list[Part]
    order: list[int] | None
    """Positions in the answer; None for the order of confidence."""
    part: int = 0
    before: int = 0
    """Tokens of the parts before the current one."""
    value: float = 0.0
    greedy: bool = True
    masked: Tensor = field(init=False)
    """(L,) bool, of the current part."""

    def __post_init__(self) -> None:
        self.masked = torch.ones(self.parts[0].length, dtype=torch.bool)

    @property
    def wanted(self) -> Tensor:
        """(L,) bool: the positions whose predictions decide the next step."""
        if self.order is None:
            return self.masked
        done = self.before + int((~self.masked).sum())
        wanted = torch.zeros_like(self.masked)
        wanted[self.order[done] - self.before] = True
        return wanted

    def step(self, found: Predictions) -> None:
        """Decode the wanted position with the highest confidence."""
        best = int(found.confidence.argmax())
        column = int(found.column[best])
        self.value += float(found.log_probability[best])
        part = self.parts[self.part]
        self.greedy &= int(found.x0[best]) == int(part.text[part.begin + column])
        self.masked[column] = False
        if not self.masked.any():
            self.part += 1
            self.before += part.length
            if self.part < len(self.parts):
                self.masked = torch.ones(self.parts[self.part].length, dtype=torch.bool)

    @property
    def ended(self) -> bool:
        """Whether every token is decoded."""
        return self.part == len(self.parts)


def walk_through(
    passes: PartialPasses,
    parts: Sequence[list[Part]],
    orders: Sequence[list[int] | None],
    batch_size: int,
    *,
    only_greedy: bool = False,
) -> tuple[list[float], list[bool]]:
    """The log-likelihood of each answer in its order, and whether each token was the predicted one.
    only_greedy: leave an answer at its first token that was not.
    """
    walks = [_Walk(each, order) for each, order in zip(parts, orders, strict=True)]
    running = walks
    while running:
        for start in range(0, len(running), batch_size):
            some = running[start : start + batch_size]
            now = [walk.parts[walk.part] for walk in some]
            masked, wanted = (
                padded([getattr(walk, name) for walk in some]) for name in ("masked", "wanted")
            )
            found = passes.predict(now, masked, wanted)
            for row, walk in enumerate(some):
                of_row = found.owner == row
                walk.step(Predictions(*(each[of_row] for each in found)))
        running = [walk for walk in running if not walk.ended and (walk.greedy or not only_greedy)]
    return [walk.value for walk in walks], [walk.greedy for walk in walks]
