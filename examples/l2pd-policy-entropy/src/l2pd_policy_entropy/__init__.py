"""Names the policy, without importing torch."""

from l2pd_plugins import PolicySpec, hookimpl


@hookimpl
def l2pd_policies() -> list[PolicySpec]:
    """The policies of this distribution."""
    return [
        PolicySpec(
            name="entropy_threshold",
            factory="l2pd_policy_entropy.policy:EntropyThreshold",
            summary="dParallel: every token below an entropy, and the lowest",
            api_version=1,
        )
    ]
