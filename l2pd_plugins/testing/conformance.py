"""The checks as a base class for a test file; needs pytest, which collects it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.testing.checks import BLOCK_LENGTHS, CHECKS, lengths_of, run_check


class PolicyConformance(ABC):
    """Subclass it in a test file, name the subclass ``Test...``, and define how the policy is
    created.

        class TestEntropyThreshold(PolicyConformance):
            def make_policy(self):
                return EntropyThreshold(limit=0.3)

    Each check becomes a separate test, named after it.
    """

    block_lengths: ClassVar[tuple[int, ...]] = BLOCK_LENGTHS

    @abstractmethod
    def make_policy(self) -> UnmaskPolicy:
        """A new policy at each call."""


def _as_test(name: str) -> Any:
    def test(self: PolicyConformance) -> None:
        for length in lengths_of(name, self.block_lengths):
            run_check(name, self.make_policy, length)

    test.__name__ = f"test_{name}"
    test.__doc__ = CHECKS[name].__doc__
    return test


for _name in CHECKS:
    setattr(PolicyConformance, f"test_{_name}", _as_test(_name))
