"""The first cases of every part; `make fuzz` runs more."""

from __future__ import annotations

import pytest

from tests.fuzz.runner import PARTS, run

CASES = {"core": 40, "adapter": 6, "files": 60, "plugins": 25}


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_found(part):
    report = run(part, cases=CASES[part], seed=0)
    assert not report.findings, str(report)
