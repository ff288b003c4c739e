"""The test class that ``python -m l2pd_plugins.testing`` runs, for the policy named there."""

from __future__ import annotations

from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.testing.conformance import PolicyConformance


class TestPolicy(PolicyConformance):
    """`make_policy` is set by the command."""

    def make_policy(self) -> UnmaskPolicy:
        raise NotImplementedError("run it as: python -m l2pd_plugins.testing module:Class")
