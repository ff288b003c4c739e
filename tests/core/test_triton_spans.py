"""The Triton kernels with short spans, so that even small rows have several spans.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

from tests.core.plain_statistics import (
    check_own_statistics,
    check_rows_without_numbers,
    logits_of,
    plain,
    values_of,
)

triton_kernel = pytest.importorskip("l2pd_plugins.statistics.triton_kernel")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning:triton"),
]


def run_kernel(logits, rows=None, given=None, suppress=-1, entropy=True, margin=True):
    tensors = [None if each is None else each.to(DEVICE) for each in (logits, rows, given)]
    found = triton_kernel.triton_kernel(*tensors, suppress, entropy, margin)
    return [each.cpu() for each in found]


@pytest.fixture(params=[8, 4096])
def run(request, monkeypatch):
    """A function that runs the kernel with this many columns per span."""
    monkeypatch.setattr(triton_kernel, "_SPAN", request.param)
    return run_kernel


@pytest.mark.parametrize("vocabulary", [2, 8, 20])
@pytest.mark.parametrize("suppress", [-1, 0, 1])
def test_every_row_has_its_own_statistics(run, vocabulary, suppress):
    logits = logits_of(4, vocabulary)
    rows, tokens = torch.tensor([3, -1, 0, 2, 2]), torch.tensor([-1, 1, 0, 1, -1])
    for which, given in ((rows, tokens), (None, tokens[:4]), (None, None)):
        found = run(logits, which, given, suppress)
        check_own_statistics(found, logits, which, given, suppress)


@pytest.mark.parametrize("run", [2, 8], indirect=True)
@pytest.mark.parametrize("suppress", [-1, 0, 1, 4])
def test_rows_without_numbers(run, suppress):
    def run_all(logits, suppress):
        return run(logits, suppress=suppress)

    check_rows_without_numbers(run_all, suppress)


@pytest.mark.parametrize(
    ("first", "second"), [(0, 1), (7, 8), (8, 7), (16, 19), (19, 0), (3, 12), (12, 3)]
)
def test_maximum_and_runner_up_are_found_in_any_two_spans(run, first, second):
    logits = logits_of(1, 20) / 3
    logits[0, second] = 5.5
    logits[0, first] = 6.0
    assert values_of(run(logits), 0) == pytest.approx(plain(logits[0], -1), abs=2e-6)
    logits[0, second] = 6.0  # equal to the maximum: the first of both is predicted
    assert values_of(run(logits), 0) == pytest.approx(plain(logits[0], -1), abs=2e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("margin", [False, True])
def test_statistics_that_are_not_required_are_empty(run, entropy, margin):
    logits = logits_of(3, 20)
    found = run(logits, torch.tensor([0, -1]), entropy=entropy, margin=margin)
    assert [len(each) for each in found] == [2, 2, 2 * entropy, 2 * margin]
    for each, value in zip(found, plain(logits[0], -1), strict=True):
        assert not len(each) or each.tolist() == pytest.approx([value, 0], abs=2e-6)
    assert [len(each) for each in run(logits[:0])] == [0] * 4


def test_a_token_that_is_suppressed_has_no_probability(run):
    found = run(logits_of(2, 20), None, torch.tensor([17, 1]), 17)
    assert found[0].tolist() == [17, 1]
    assert found[1][0] == 0 < found[1][1]


def test_one_column_that_is_suppressed(run):
    x0, *others = run(torch.zeros(1, 1), suppress=0)
    assert x0.tolist() == [0]
    assert all(each.isnan().all() for each in others)
    assert values_of(run(torch.zeros(1, 1)), 0) == [0, 1, 0, 1]


def test_spans_of_only_minus_infinity_add_nothing(run):
    logits = torch.full((2, 20), -torch.inf)
    logits[0, 9] = logits[0, 11] = 1.0
    logits[1, 19], logits[1, 0] = 3.0, -3e38
    found = run(logits)
    for at in range(2):
        assert values_of(found, at) == pytest.approx(plain(logits[at], -1), abs=2e-6)


def test_any_layout_is_read_and_only_the_rows_of_the_view(run):
    wide = logits_of(4, 30)
    wanted = run(wide[1:, 10:25].contiguous())
    for view in (wide[1:, 10:25], wide[1:, 10:25].t().contiguous().t()):
        assert all(torch.equal(a, b) for a, b in zip(run(view), wanted, strict=True))


@pytest.mark.parametrize("run", [8], indirect=True)
def test_values_beside_a_row_do_not_affect_it(run):
    """There are three spans, which the kernel rounds up to four. All logits of row 2 are above
    those of row 1, and row 3 has only NaN."""
    logits = logits_of(4, 20) - torch.tensor([[0.0], [60.0], [0.0], [torch.nan]])
    found = run(logits)
    for at in range(3):
        assert values_of(found, at) == pytest.approx(plain(logits[at], -1), abs=2e-6)


def test_nothing_is_read_for_negative_row_numbers(run):
    """A read at such an address would end the process."""
    rows, tokens = torch.tensor([-(1 << 40), 1]), torch.tensor([3, 3])
    for given in (tokens, None):
        found = run(logits_of(2, 20), rows, given)
        assert values_of(found, 0) == [0] * 4
        assert float(found[1][1]) > 0


def test_the_default_device_is_not_used(run):
    logits = logits_of(1, 20)
    wanted = run(logits)
    with torch.device("meta"):
        found = run(logits)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_rows_longer_than_a_usual_span():
    logits = logits_of(1, triton_kernel._SPAN + 4)
    logits[0, -2] = 15.0
    assert values_of(run_kernel(logits), 0) == pytest.approx(plain(logits[0], -1), abs=2e-6)


def test_rows_that_are_contiguous_are_not_copied(run):
    logits = logits_of(1, 20).to(DEVICE)
    found = run(
        logits.expand(1 << 40, 20), torch.tensor([1 << 39, 0])
    )  # there is no memory for a copy
    for at in range(2):
        assert values_of(found, at) == pytest.approx(plain(logits[0].cpu(), -1), abs=2e-6)
