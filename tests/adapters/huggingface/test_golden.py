"""The golden traces of all engines, by the transformers adapter."""

import pytest

from tests.engines.golden import RUNS, decode, golden


@pytest.mark.parametrize("run", range(len(RUNS)), ids=lambda run: RUNS[run][0]["name"])
def test_golden_traces(run: int) -> None:
    policy, cases = golden()[run]
    assert (policy, len(cases)) == RUNS[run]
    assert decode(*RUNS[run]) == cases
