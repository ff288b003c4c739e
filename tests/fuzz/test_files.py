"""A short run of the fuzz of files; `python -m tests.fuzz` runs it for as long as one likes."""

import random

import pytest

from tests.fuzz.files import try_one


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_malformed_files(first: int) -> None:
    for seed in range(first, first + 20):
        try_one(random.Random(seed))
