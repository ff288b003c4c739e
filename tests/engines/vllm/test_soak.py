"""A minute of `make soak`."""

from tests.engines.soak import on_vllm
from tests.engines.soak.one_minute import check_one_minute


def test_a_minute_of_mixed_load(tmp_path):
    check_one_minute(on_vllm, tmp_path)
