"""Policies as a third party might offer them, for what the built-in ones never do."""

from l2pd_plugins import PolicySpec, hookimpl


@hookimpl
def l2pd_policies():
    return [
        PolicySpec(
            name="raising",
            factory="l2pd_engine_policies.rules:Raising",
            summary="one token a step, and an error from a given step of a block on",
            api_version=1,
        ),
        PolicySpec(
            name="persistent",
            factory="l2pd_engine_policies.rules:Persistent",
            summary="what was predicted at the step before as well",
            api_version=1,
        ),
        PolicySpec(
            name="coin",
            factory="l2pd_engine_policies.rules:Coin",
            summary="any position, by the toss of a coin",
            api_version=1,
        ),
    ]
