"""Asking the policies of a batch: what each group sees, and its answer.

A policy gets its own rows alone, and only what it requires. A failure is handled here, so that the
step goes on with the progress rule.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from l2pd_plugins.blocks import OF_THE_BLOCK, BlockBatch
from l2pd_plugins.errors import ANY_FAILURE
from l2pd_plugins.policy import DenoisingStep
from l2pd_plugins.policy_calls import (
    InputChanged,
    OnError,
    report_columns,
    report_failure,
    stand_in,
)
from l2pd_plugins.policy_groups import Group

_OF_LOGITS = ("x0", "confidence", "entropy", "margin")


def seen_by(
    step: DenoisingStep, group: Group, block: BlockBatch, on_error: OnError
) -> DenoisingStep:
    """The step for the group's rows, with only the statistics that its policy requires."""
    requires = group.runner.traits.requires
    changes: dict[str, Any] = {
        name: None for name in ("entropy", "margin", "logits", "reference") if name not in requires
    }
    if "committed" not in requires and "committed" in block.requires:
        masked, certain = block.masked, block.present.to(torch.float32)
        changes["x0"] = torch.where(masked, step.x0, block.tokens)
        changes["confidence"] = torch.where(masked, step.confidence, certain)
        if "entropy" in requires and step.has("entropy"):
            changes["entropy"] = step.entropy * masked
        if "margin" in requires and step.has("margin"):
            changes["margin"] = torch.where(masked, step.margin, certain)
    generators = block.generators
    if generators is not None and generators[group.members[0]] is not None:
        # Only for its own rows; the others are never read.
        changes["generator"] = tuple(generators)
    # Always a copy, so that no policy holds the step that the core continues to use.
    seen = step.changed(policy=group.runner.traits.name, **changes)
    if group.index is not None:
        return seen.select_rows(group.index, group.members)
    if on_error == "raise":  # a policy that writes to its input ends the decode
        return seen
    # The group has all rows: copy the block's own tensors, so that a write does not reach the
    # block. Copy what was computed from the logits, too, if the policy may write to these, if the
    # group may have to be asked again in parts, or if it remasks: nothing is computed again then.
    names = [*OF_THE_BLOCK]
    if seen.has("logits") or group.columns or group.runner.traits.remasks:
        names += [name for name in _OF_LOGITS if seen.has(name)]
    return seen.changed(**{name: getattr(seen, name).clone() for name in names})


def ask(
    group: Group,
    method: Literal["select", "remask"],
    step: DenoisingStep,
    block: BlockBatch,
    on_error: OnError,
) -> Tensor | None:
    """The policy's answer; None if it fails."""
    runner, before = group.runner, dict(group.state)
    try:
        return group.ask(method, step)
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE as error:
        if group.columns:
            report_columns(runner, method, group.columns, error, on_error)
        elif isinstance(error, InputChanged) or not runner.keeps_form(before, step.masked):
            # It cannot be called again: it has changed the rows or their state.
            group.runner, before = stand_in(runner.policy, method, error, on_error), {}
            for row in group.members:
                block.policies[row] = group.runner.policy
        else:
            report_failure(runner.policy, method, error, on_error)
        group.state = before
        return None


def of_group(values: Tensor, group: Group) -> Tensor:
    """The group's rows of values (B, ...)."""
    return values if group.index is None else values.index_select(0, group.index)


def put_group(target: Tensor, group: Group, values: Tensor) -> None:
    """Write values (N, ...) into the group's rows of target (B, ...)."""
    if group.index is None:
        target.copy_(values)
    else:
        target.index_copy_(0, group.index, values)


def joined(block: BlockBatch, values: list[Tensor]) -> Tensor:
    """bool (B, L) of all rows, joined from those of each group."""
    if len(values) == 1 and block._groups[0].index is None:
        return values[0]
    joined = torch.zeros_like(block.masked)
    for group, of_group in zip(block._groups, values, strict=True):
        put_group(joined, group, of_group)
    return joined
