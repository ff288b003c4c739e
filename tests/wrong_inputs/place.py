"""What the rows of the tables act on, and how a row is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from tests.conftest import PluginSite


@dataclass(frozen=True)
class Place:
    """A folder of its own for each row, and a small model that is not to be run."""

    folder: Path
    """Empty at first."""
    model: Any
    tokenizer: Any
    source: Path
    """The folder of the model, with its own filters; not to be changed."""
    ids: torch.Tensor
    """(1, P) int64: the token ids of a prompt."""
    site: PluginSite
    """Where distributions can be installed."""
    l2pd: Callable[..., Any]
    """Runs the command line."""


Act = Callable[[Place], object]
Rows = dict[str, tuple[Act, str]]
"""For each wrong input its description, what is done, and the words that the error must contain:
pieces in this order, separated by "...".
"""
