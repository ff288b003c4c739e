"""The conformance kit, and a place for tests of the rule itself."""

from types import SimpleNamespace

import torch

from l2pd_plugins import UnmaskPolicy, create_policy
from l2pd_plugins.testing import PolicyConformance


class TestConformance(PolicyConformance):
    def make_policy(self) -> UnmaskPolicy:
        return create_policy("entropy_threshold")


def test_low_entropies_and_the_lowest_are_taken() -> None:
    step = SimpleNamespace(
        masked=torch.tensor([[True, True, False, True], [True, True, True, True]]),
        entropy=torch.tensor([[0.44, 0.46, 0.0, 0.1], [0.9, 0.8, 0.7, 0.71]]),
    )
    taken = create_policy("entropy_threshold").select(step, {})
    assert taken.tolist() == [[True, False, False, True], [False, False, True, False]]
