"""The golden traces of all engines, by the transformers adapter."""

import pytest

from tests.engines.golden import POLICIES, decode, golden


@pytest.mark.parametrize("run", range(len(POLICIES)))
def test_golden_traces(run: int) -> None:
    policy, cases = golden()[run]
    assert policy == POLICIES[run]
    assert decode(policy) == cases
