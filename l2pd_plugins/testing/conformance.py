"""The checks as a base class for a test file; needs pytest, which collects it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from l2pd_plugins.policy import UnmaskPolicy
from l2pd_plugins.testing.checks import CHECKS
from l2pd_plugins.testing.run import BLOCK_LENGTHS, failing_before, failure_of


class PolicyConformance(ABC):
    """Subclass it in a test file, name the subclass ``Test...``, and define how the policy is
    created.

        class TestEntropyThreshold(PolicyConformance):
            def make_policy(self):
                return EntropyThreshold(limit=0.3)

    Each check becomes a separate test, named after it. If the policy cannot decode a block at all,
    one test fails, and the tests that depend on it are skipped.
    """

    block_lengths: ClassVar[tuple[int, ...]] = BLOCK_LENGTHS

    @abstractmethod
    def make_policy(self) -> UnmaskPolicy:
        """A new policy at each call."""


def _as_test(name: str) -> Any:
    def test(self: PolicyConformance) -> None:
        import pytest

        failure = failure_of(name, self.make_policy, self.block_lengths)
        if failure is None:
            return
        earlier = failing_before(name, self.make_policy, self.block_lengths)
        if earlier is not None:
            pytest.skip(f"not decided, since {earlier} fails")
        pytest.fail(failure, pytrace=False)

    test.__name__ = f"test_{name}"
    test.__doc__ = CHECKS[name].__doc__
    return test


for _name in CHECKS:
    setattr(PolicyConformance, f"test_{_name}", _as_test(_name))
