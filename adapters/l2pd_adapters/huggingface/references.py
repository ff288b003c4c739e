"""Reference answers for policies that require them, laid out for a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2pd_adapters.huggingface.settings import DecodeSettings
from l2pd_plugins import UnmaskPolicy
from l2pd_plugins.errors import L2PDError


def given_references(
    settings: DecodeSettings, device: torch.device
) -> tuple[Tensor | None, list[int]]:
    """The references that the policies have, and the sequences whose policies lack one.

    Returns (B, max_new_tokens + block_length) int64, since the last block may extend beyond the
    canvas, with end-of-text tokens after each reference; None if no policy requires one. Raises
    L2PDError for references that do not fit the call.
    """
    members: dict[int, list[int]] = {}
    for sequence, policy in enumerate(settings.policies):
        if "reference" in policy.requires:
            members.setdefault(id(policy), []).append(sequence)
    if not members:
        return None, []
    shape = (len(settings.policies), settings.canvas.max_new_tokens + settings.canvas.block_length)
    reference = torch.full(shape, settings.canvas.filler, device=device)
    missing: list[int] = []
    for sequences in members.values():
        policy = settings.policies[sequences[0]]
        if policy.reference is None:
            missing += sequences
        else:
            _fill(reference, sequences, policy.reference, policy, settings)
    return reference, missing


def _fill(
    reference: Tensor,
    sequences: list[int],
    given: Any,
    policy: UnmaskPolicy,
    settings: DecodeSettings,
) -> None:
    """Lay out a policy's reference: one list for all its sequences, or one for each."""
    given = given.tolist() if isinstance(given, Tensor) else list(given)
    nested = bool(given) and isinstance(given[0], list | tuple)
    lists = given if nested else [given] * len(sequences)
    if len(lists) != len(sequences):
        raise L2PDError(f"{policy.name}: {len(lists)} references for {len(sequences)} sequences")
    for sequence, tokens in zip(sequences, lists, strict=True):
        if len(tokens) > settings.canvas.max_new_tokens:
            raise L2PDError(
                f"{policy.name}: a reference of {len(tokens)} tokens is longer than "
                f"max_new_tokens={settings.canvas.max_new_tokens}"
            )
        reference[sequence, : len(tokens)] = torch.tensor(list(tokens), device=reference.device)
