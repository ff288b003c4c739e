"""The valid arguments of `collect` and `train_filter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from l2pd_adapters.huggingface.checking import (
    EVALUATE,
    GENERATE,
    MOST_SEQUENCES,
    Kind,
    Number,
    Of,
    OneOf,
    Such,
    Whole,
    check,
    short,
)
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.trajectories import LABELS

_FOLDER = Of((str, Path), "a folder")
_BOTH: dict[str, Kind] = {
    "out": _FOLDER,
    "source": Of(str, "a text"),
    "max_new_tokens": GENERATE["max_new_tokens"],
    "block_length": GENERATE["block_length"],
    "cache": GENERATE["cache"],
    "batch_size": EVALUATE["batch_size"],
    "labels": OneOf(LABELS),
}
COLLECT: dict[str, Kind] = {
    **_BOTH,
    "policies": Of((list, tuple), "a list of policies"),
    "prompts_per_shard": Whole(1),
    "references_from": _FOLDER,
    "rank": Whole(0, MOST_SEQUENCES),
    "world_size": Whole(1, MOST_SEQUENCES),
    "progress": EVALUATE["progress"],
}
"""The arguments of `collect` besides the model, the tokenizer and the prompts."""
TRAIN: dict[str, Kind] = {
    **_BOTH,
    "data": _FOLDER,
    "policy": Of(str, "the name of a policy with a filter"),
    "rounds": Whole(0, 1000),
    "load": Such(
        lambda value: (
            callable(value) and not isinstance(value, type) and not isinstance(value, nn.Module)
        ),
        "a function that returns the model and its tokenizer",
    ),
    "epochs": Whole(1),
    "false_positive_rate": Number(least=0, most=1),
    "seed": EVALUATE["seed"],
}
"""The arguments of `train_filter` besides the prompts."""


_OPTIONAL = {
    *("block_length", "cache", "epochs", "load", "progress", "rank", "references_from"),
    "world_size",
}
"""Arguments that may be None."""


def require_arguments(table: dict[str, Kind], **given: Any) -> None:
    """Raise L2PDError for an argument that is not of its kind."""
    for name, value in given.items():
        if value is None and name not in _OPTIONAL:
            raise L2PDError(f"{name}=None: expected {table[name].expected}")
        check(table, name, value)


def require_pair(loaded: Any) -> tuple[Any, Any]:
    """What `load` returned. Raises L2PDError if it is not a model and its tokenizer."""
    if not isinstance(loaded, tuple | list) or len(loaded) != 2:
        raise L2PDError(f"load() returned {short(loaded)}; expected the model and its tokenizer")
    return loaded[0], loaded[1]
