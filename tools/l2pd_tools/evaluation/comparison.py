"""Comparing several policies on the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from l2pd_plugins import UnmaskPolicy, create_policy
from l2pd_plugins.policy_attributes import description_of, name_of, options_of, printable_name_of
from l2pd_tools.progress import progress

if TYPE_CHECKING:
    from l2pd_tools.evaluation.prompts import Prompt
    from l2pd_tools.evaluation.results import Evaluation


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
    def label_in_lines(self) -> str:
        """The policy's name, and its options below it: for narrow tables."""
        options = [f"{k}={v}" for k, v in options_of(self.policy).items() if v is not None]
        return "\n ".join([printable_name_of(self.policy), *options])


def require_accepted(
    model: Any, policies: Sequence[UnmaskPolicy], settings: Mapping[str, Any]
) -> None:
    """Raise L2PDError if one of the policies cannot decode on this model with the settings, which
    are those of `run_policies`: before the first of them has run.
    """
    from l2pd_adapters.huggingface.enabling import configuration_of
    from l2pd_tools.evaluation.run import settings_of_generate

    for policy in policies:
        configuration_of(model, unmask_policy=policy, **settings_of_generate(**settings))


def run_policies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    policies: Sequence[UnmaskPolicy],
    settings: Mapping[str, Any],
) -> list[Row]:
    """Evaluate every policy on all prompts, first the one-token-per-step reference."""
    from l2pd_tools.evaluation.run import evaluate

    # Warm up: the first forward passes of a process are slow, and no policy should be charged for
    # them.
    evaluate(model, tokenizer, prompts[:1], policy="fixed_schedule", max_new_tokens=1)

    at = next((i for i, policy in enumerate(policies) if one_token_per_step(policy)), None)
    slow = create_policy("fixed_schedule") if at is None else policies[at]
    results: dict[int, Evaluation] = {}
    runs = len(policies) + (at is None)
    with progress(runs * len(prompts)) as start:

        def run(policy: UnmaskPolicy, **given: Any) -> Evaluation:
            advance = start(f"decoding: {description_of(policy)}")
            arguments = {"policy": policy, "progress": advance, **settings, **given}
            return evaluate(model, tokenizer, prompts, **arguments)

        reference = run(slow)
        if at is not None:
            results[at] = replace(reference, reference_answers=reference.answers)
        for i, policy in enumerate(policies):
            if i != at:
                results[i] = run(policy, reference_answers=reference.answers)
    return [Row(policy, results[i]) for i, policy in enumerate(policies)]


def one_token_per_step(policy: UnmaskPolicy) -> bool:
    """Whether this policy is the reference with which the others are compared."""
    return name_of(policy) == "fixed_schedule" and options_of(policy).get("tokens_per_step") == 1


def percent(share: float | None) -> str:
    """A share as a table shows it."""
    return "-" if share is None else f"{100 * share:.1f}"
