"""The policies that come with the project. This module only names them and imports no torch."""

from __future__ import annotations

from l2pd_plugins import PolicySpec, hookimpl


@hookimpl
def l2pd_policies() -> list[PolicySpec]:
    """The built-in policies."""
    return [
        PolicySpec(
            name="fixed_schedule",
            factory="l2pd_policies.fixed_schedule:FixedSchedule",
            summary="LLaDA's low-confidence remasking: the k most confident tokens a step",
        ),
        PolicySpec(
            name="confidence_threshold",
            factory="l2pd_policies.confidence_threshold:ConfidenceThreshold",
            summary="Fast-dLLM's rule: every token whose confidence reaches the threshold",
        ),
        PolicySpec(
            name="learn2pd",
            factory="l2pd_policies.learn2pd:Learn2PD",
            summary="a small learned filter over the block's confidences (arXiv 2509.25188)",
        ),
        PolicySpec(
            name="settled",
            factory="l2pd_policies.settled:Settled",
            summary="a learned convolution over cheap signals, for any block length",
        ),
        PolicySpec(
            name="oracle",
            factory="l2pd_policies.oracle:Oracle",
            summary="extremely greedy parallel: tokens that equal a reference decode; the rule "
            "that learn2pd's filter imitates, and its upper bound",
        ),
    ]
