"""The hook through which plugins offer policies, and the markers for it.

A plugin is a module (or object) that an entry point of group ``l2pd_plugins`` names and that
carries the functions below, each marked with ``@hookimpl``.
"""

from __future__ import annotations

import pluggy

from l2pd_plugins.policy import PolicySpec

PROJECT_NAME = "l2pd_plugins"
"""Name of the hooks' project, and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


@hookspec
def l2pd_policies() -> list[PolicySpec]:  # type: ignore[empty-body]
    """The policies that this plugin offers, as a list of PolicySpec.

    Called once per process, when policies are first looked up or listed. It takes no arguments and
    should import nothing heavy: a spec names its policy by a ``"module:attribute"`` string, which
    is imported only when the policy is created. The names must be unique; the manager fills in
    `origin`.

    If it raises or returns anything else, the whole plugin is marked as failed, with the reason;
    other plugins are not affected.

        @hookimpl
        def l2pd_policies():
            return [
                PolicySpec(
                    name="entropy_bound",
                    factory="my_package.policies:EntropyBound",
                    summary="the most tokens whose summed entropy stays within a bound",
                    api_version=1,
                )
            ]
    """
