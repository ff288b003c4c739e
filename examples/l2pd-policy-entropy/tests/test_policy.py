"""The conformance kit, and a place for tests of the rule itself."""

from types import SimpleNamespace

import l2pd_policy_entropy
import torch

from l2pd_plugins import UnmaskPolicy, create_policy
from l2pd_plugins.testing import PolicyConformance, check_plugin


class TestConformance(PolicyConformance):
    def make_policy(self) -> UnmaskPolicy:
        return create_policy("entropy_threshold")


def test_the_plugin_offers_the_policy() -> None:
    assert [spec.name for spec in check_plugin(l2pd_policy_entropy)] == ["entropy_threshold"]


def test_low_entropies_and_the_lowest_are_taken() -> None:
    step = SimpleNamespace(
        masked=torch.tensor([[True, True, False, True], [True, True, True, True]]),
        entropy=torch.tensor([[0.44, 0.46, 0.0, 0.1], [0.9, 0.8, 0.7, 0.71]]),
    )
    taken = create_policy("entropy_threshold").select(step, {})
    assert taken.tolist() == [[True, False, False, True], [False, False, True, False]]
