"""Two minutes of `make soak`."""

from tests.engines.soak import on_vllm
from tests.engines.soak.short_run import check_two_minutes


def test_two_minutes_of_mixed_load(tmp_path):
    check_two_minutes(on_vllm, tmp_path)
