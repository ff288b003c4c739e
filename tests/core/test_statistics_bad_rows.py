"""Rows of NaN or infinity: every kernel predicts the same token, and never the suppressed one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2pd_plugins.statistics import KERNELS, row_statistics

EVERYTHING = frozenset({"confidence", "entropy", "margin"})
INFINITY, NAN = float("inf"), float("nan")

# Warnings of Triton's interpreter about NaN and infinity, which these tests use.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning:triton"),
]


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param != "eager":
        pytest.importorskip(request.param)
    return request.param


def run(kernel: str, logits: torch.Tensor, suppress: int | None):
    device = "cuda" if kernel == "triton" and torch.cuda.is_available() else "cpu"
    found = row_statistics(logits.to(device), EVERYTHING, suppress, kernel=kernel)
    return found.x0.tolist(), found.confidence.tolist()


def plain_argmax(row: list[float], suppress: int | None) -> int:
    """The first NaN, else the first highest value, among the columns that may be predicted."""
    open_columns = [i for i in range(len(row)) if i != suppress] or [0]
    for i in open_columns:
        if row[i] != row[i]:
            return i
    return max(open_columns, key=lambda i: (row[i], -i))


@pytest.mark.parametrize("suppress", [None, 0, 1, 300, 4095, 4096, 4999])
def test_a_row_of_only_minus_infinity_predicts_the_first_open_column(kernel, suppress):
    found, confidence = run(kernel, torch.full((3, 5000), -INFINITY), suppress)
    assert found == [1 if suppress == 0 else 0] * 3
    assert all(value != value for value in confidence)


@pytest.mark.parametrize("bad", [NAN, -NAN, INFINITY])
@pytest.mark.parametrize("suppress", [None, 0, 7, 4999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_nan_or_infinity_is_predicted_unless_it_is_suppressed(
    kernel, bad, suppress, dtype
):
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, [0, 7, 4999]] = bad
    logits[1, [7, 4500]] = bad
    logits[2] = bad
    logits[3, 4999] = bad
    found, confidence = run(kernel, logits, suppress)
    assert found == [plain_argmax(row, suppress) for row in logits.tolist()]
    assert all(value != value for value in confidence[:3])
    assert (confidence[3] != confidence[3]) == (suppress != 4999)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_row_has_the_argmax_of_its_open_columns(kernel, data):
    vocabulary = data.draw(st.sampled_from([1, 2, 3, 9, 513, 4097]))
    suppress = data.draw(st.none() | st.integers(0, vocabulary - 1))
    row = torch.full((vocabulary,), data.draw(st.sampled_from([-INFINITY, 0.0])))
    places = st.integers(0, vocabulary - 1)
    values = st.sampled_from([NAN, -NAN, INFINITY, -INFINITY, 1.0, 2.0])
    for place, value in data.draw(st.lists(st.tuples(places, values), max_size=5)):
        row[place] = value
    found, _ = run(kernel, row[None], suppress)
    assert found == [plain_argmax(row.tolist(), suppress)]
