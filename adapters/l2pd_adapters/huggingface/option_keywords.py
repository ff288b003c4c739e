"""Options of policies that were given as keywords of `generate`: where they go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l2pd_adapters.huggingface.checking import close_to, short
from l2pd_plugins import L2PDError, PolicySpec, UnmaskPolicy, list_policies
from l2pd_plugins.plugins import find_policy, load_factory, option_parameters
from l2pd_plugins.policy_attributes import options_of, printable_name_of


def as_option(name: str, value: object, policy: Any, *, among_others: bool = True) -> str:
    """The error for a keyword that is an option of a policy; empty if no policy has such an option.

    Args:
        policy: what was given as `unmask_policy`, or None.
        among_others: whether to search the policies that were not chosen.
    """
    told = f"{name}={short(value)}: it is an option of the "
    goes = f"unmask_options={{{name!r}: {short(value)}}}"
    chosen, options = _chosen(policy)
    if name in options:
        if isinstance(policy, UnmaskPolicy):
            return (
                f"{told}policy {chosen}; make the policy object with it, as {name}={short(value)}"
            )
        return f"{told}policy {chosen}; write {goes}"
    if not among_others:
        return ""
    having = dict.fromkeys(s.name for s in list_policies() if name in _options_of(s))
    if not having:
        return ""
    named = f"polic{'ies' if len(having) > 1 else 'y'} {', '.join(having)}"
    instead = f", not of {chosen}" if chosen else ""
    return f"{told}{named}{instead}; write unmask_policy={next(iter(having))!r}, {goes}"


def close_option(name: str, policy: Any) -> str:
    """A suggestion of an option of the chosen policy; empty if none is close."""
    chosen, options = _chosen(policy)
    close = close_to(name, options).removesuffix("?")
    return f"{close}, an option of {chosen}, in unmask_options?" if close else ""


def _chosen(policy: Any) -> tuple[str, list[str]]:
    """Name and options of what was given as `unmask_policy`; empty if it is no policy."""
    if isinstance(policy, UnmaskPolicy):
        return printable_name_of(policy), list(options_of(policy))
    name = policy.get("name") if isinstance(policy, Mapping) else policy
    if not isinstance(name, str):
        return "", []
    try:
        spec = find_policy(name)
    except L2PDError:
        return "", []
    return spec.name, _options_of(spec)


def _options_of(spec: PolicySpec) -> list[str]:
    try:
        parameters = option_parameters(load_factory(spec))
    except L2PDError:  # a broken plugin
        return []
    return [parameter.name for parameter in parameters or ()]
