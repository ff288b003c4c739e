"""Comparing several policies on the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from l2pd_plugins import UnmaskPolicy, create_policy
from l2pd_plugins.policy_attributes import (
    description_of,
    identity_of,
    name_of,
    options_of,
    printable_name_of,
)
from l2pd_tools.progress import progress

if TYPE_CHECKING:
    from l2pd_tools.evaluation.prompts import Prompt
    from l2pd_tools.evaluation.results import Answer, Evaluation
    from l2pd_tools.evaluation.run_folder import RunFolder


@dataclass(frozen=True)
class Row:
    """A policy and its evaluation."""

    policy: UnmaskPolicy
    result: Evaluation

    @property
    def label(self) -> str:
        """The policy and its options, as one word."""
        return description_of(self.policy)

    @property
    def word(self) -> str:
        """The policy as written for --policy."""
        return ",".join([printable_name_of(self.policy), *self._options])

    @property
    def label_in_lines(self) -> str:
        """The policy's name, and its options below it: for narrow tables."""
        return "\n ".join([printable_name_of(self.policy), *self._options])

    @property
    def _options(self) -> list[str]:
        return [f"{k}={v}" for k, v in options_of(self.policy).items() if v is not None]


@dataclass(frozen=True)
class Differing:
    """A prompt that is not answered alike."""

    prompt: Prompt
    answers: tuple[tuple[tuple[str, ...], Answer], ...]
    """Each answer, and who gave it: numbers of rows from 1, or `ONE_TOKEN_PER_STEP`."""


ONE_TOKEN_PER_STEP = "one token per step"


def differing(rows: Sequence[Row]) -> list[Differing]:
    """The prompts whose answers differ between the rows, or from those at one token per step."""
    given = {str(number): row.result.answers for number, row in enumerate(rows, start=1)}
    reference = rows[0].result.reference_answers
    if reference is not None and not any(one_token_per_step(row.policy) for row in rows):
        given = {ONE_TOKEN_PER_STEP: reference, **given}
    found = []
    for i, first in enumerate(rows[0].result.answers):
        alike: dict[tuple[int, ...], list[str]] = {}
        for name, answers in given.items():
            alike.setdefault(answers[i].tokens, []).append(name)
        if len(alike) > 1:
            groups = tuple((tuple(names), given[names[0]][i]) for names in alike.values())
            found.append(Differing(first.prompt, groups))
    return found


def require_accepted(
    model: Any, policies: Sequence[UnmaskPolicy], settings: Mapping[str, Any]
) -> None:
    """Raise L2PDError if one of the policies cannot decode on this model with the settings, which
    are those of `finished_rows` without the batch size: before the first of them has run.
    """
    for policy in policies:
        _bound(model, policy, settings)


def finished_rows(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    policies: Sequence[UnmaskPolicy],
    settings: Mapping[str, Any],
    folder: RunFolder | None = None,
) -> Iterator[tuple[int, Row]]:
    """Evaluate every policy on all prompts, first the one-token-per-step reference; each row, with
    its place among the policies, as soon as it is finished.

    folder: policies that are finished there are not decoded again; the others are saved in it.
    """
    from l2pd_tools.evaluation.run import evaluate

    at = next((i for i, policy in enumerate(policies) if one_token_per_step(policy)), None)
    slow = create_policy("fixed_schedule") if at is None else policies[at]
    order = [(at, slow), *((i, policy) for i, policy in enumerate(policies) if i != at)]
    names = [_identity(model, policy, settings) if folder else "" for _, policy in order]
    saved = [folder.answers(name, prompts) if folder else None for name in names]
    waiting = saved.count(None)
    if waiting:
        # Warm up: the first forward passes of a process are slow, and no policy should be charged
        # for them.
        evaluate(model, tokenizer, prompts[:1], policy="fixed_schedule", max_new_tokens=1)
    reference: tuple[Answer, ...] | None = None
    with progress(waiting * len(prompts)) as start:
        for (i, policy), name, result in zip(order, names, saved, strict=True):
            if result is None:
                result = evaluate(
                    model,
                    tokenizer,
                    prompts,
                    policy=policy,
                    progress=start(f"decoding: {description_of(policy)}"),
                    reference_answers=reference,
                    **settings,
                )
                if folder is not None:
                    folder.save(name, result)
            reference = reference or result.answers
            if i is not None:
                yield i, Row(policy, replace(result, reference_answers=reference))


def _identity(model: Any, policy: UnmaskPolicy, settings: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in settings.items() if name != "batch_size"}
    return identity_of(_bound(model, policy, plain))


def _bound(model: Any, policy: UnmaskPolicy, settings: Mapping[str, Any]) -> UnmaskPolicy:
    """The policy as it decodes on this model: with its filter, for example."""
    from l2pd_adapters.huggingface.enabling import settings_of
    from l2pd_tools.evaluation.run import settings_of_generate

    return settings_of(model, unmask_policy=policy, **settings_of_generate(**settings)).policies[0]


def one_token_per_step(policy: UnmaskPolicy) -> bool:
    """Whether this policy is the reference with which the others are compared."""
    return name_of(policy) == "fixed_schedule" and options_of(policy).get("tokens_per_step") == 1


def percent(share: float | None) -> str:
    """A share as a table shows it."""
    return "-" if share is None else f"{100 * share:.1f}"
