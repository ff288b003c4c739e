"""The arguments of the harness's model: their kinds, and the policy and the device they name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from l2pd_adapters.huggingface.checking import (
    GENERATE,
    LIKELIHOOD,
    LOAD,
    MOST_SEQUENCES,
    SEEDS_BELOW,
    Flag,
    Kind,
    Of,
    OneOf,
    Whole,
    close_to,
    short,
)
from l2pd_adapters.huggingface.likelihood import ORDERS
from l2pd_plugins import L2PDError, UnmaskPolicy, create_policy
from l2pd_plugins.errors import PolicyOptionError


@dataclass(frozen=True)
class _BatchSize(Whole):
    """As `Whole`; for a string such as "auto" the message has the reason."""

    @property
    def expected(self) -> str:
        return f"{super().expected}; automatic batch-size search is not supported"


@dataclass(frozen=True)
class _Nothing:
    """Accepts no value."""

    expected: str = "nothing; automatic batch-size search is not supported"

    def take(self, value: Any) -> Any:
        raise ValueError


ARGUMENTS: dict[str, Kind] = {
    **{name: GENERATE[name] for name in ("max_new_tokens", "block_length", "end_of_text")},
    "pretrained": Of(str, "a shipped model, a folder, or a hub id"),
    "unmask_policy": Of((str, Mapping), "a policy's name, or its config"),
    "unmask_options": GENERATE["unmask_options"],
    "cache": OneOf(("none", "prefix", "dual", "block")),
    "seed": Whole(0, SEEDS_BELOW - 1),
    "samples": LIKELIHOOD["samples"],
    "likelihood_order": OneOf(ORDERS),
    **{name: LOAD[name] for name in ("dtype", "device_map")},
    "device": Of(str, "a device, as cpu or cuda"),
    "peft": Of(str, "a folder or a hub id"),
    "max_length": GENERATE["max_length"],
    "batch_size": _BatchSize(1, MOST_SEQUENCES),
    "max_batch_size": _Nothing(),
    "trust_remote_code": Flag(),
}
"""The kind of each of the model's arguments."""


def policy_of(policy: Any, options: Mapping[str, Any], known: Mapping[str, Any]) -> UnmaskPolicy:
    """Create the policy. An argument unknown to both the policy and the model may be misspelt."""
    try:
        return create_policy(policy, **options)
    except PolicyOptionError as error:
        for name in options:
            hint = close_to(name, known)
            if f"{name!r}" in str(error) and hint:
                raise L2PDError(f"{name}={short(options[name])}: {error}{hint}") from error
        raise


def own_device(named: str | None = None) -> str:
    """The device of this process; the user may have named its type.

    Raises L2PDError if there are several processes and a GPU number is given: all would use that
    GPU.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if named is not None and named != "cuda":
        if processes > 1 and named.startswith("cuda:"):
            raise L2PDError(
                f"device={named!r}: {processes} processes would take the same GPU; leave it out, "
                "and each takes its own"
            )
        return named
    if named is None and not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
