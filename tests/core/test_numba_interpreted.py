"""The Numba kernel's code, run by Python without compilation: every line of it, on small rows."""

from __future__ import annotations

import importlib.util

import pytest
import torch

numba = pytest.importorskip("numba")
np = pytest.importorskip("numpy")

from l2pd_plugins.statistics import numba_kernel as compiled  # noqa: E402
from tests.core.plain_statistics import (  # noqa: E402
    check_own_statistics,
    check_rows_without_numbers,
    logits_of,
    plain,
    values_of,
)

FLOATS = {np.dtype(np.int16): np.float16, np.dtype(np.int32): np.float32}


def wide(bits):
    if bits.dtype == np.uint16:
        return (np.uint32(bits) << np.uint32(16)).view(np.float32)
    return np.float32(bits.view(FLOATS[bits.dtype]))


@pytest.fixture
def module(monkeypatch):
    """The kernel's module with plain functions; calls of the compiler are replaced."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    spec = importlib.util.spec_from_file_location("interpreted_kernel", compiled.__file__)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made._wide = wide
    made._float_of = lambda bits: np.int32(bits).view(np.float32)
    made._bits_of = lambda value: np.float32(value).view(np.int32)
    with np.errstate(all="ignore"):
        yield made


@pytest.mark.parametrize("vocabulary", [2, 3, 9, 40])
@pytest.mark.parametrize("suppress", [-1, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_row_has_its_own_statistics(module, vocabulary, suppress, dtype):
    logits = logits_of(4, vocabulary, dtype)
    rows, tokens = torch.tensor([3, -1, 0, 2, 2]), torch.tensor([-1, 1, 0, 1, -1])
    for which, given in ((rows, tokens), (rows, None), (None, tokens[:4]), (None, None)):
        found = module.numba_kernel(logits, which, given, suppress, True, True)
        check_own_statistics(found, logits, which, given, suppress)


@pytest.mark.parametrize("place", [0, 1023, 1024, 2099])
@pytest.mark.parametrize("suppress", [-1, 1024])
def test_the_maximum_is_found_in_any_tile(module, place, suppress):
    logits = logits_of(1, 2100) / 3
    logits[0, place] = 12.0
    logits[0, (place + 1100) % 2100] = 11.5
    found = module.numba_kernel(logits, None, None, suppress, True, True)
    assert values_of(found, 0) == pytest.approx(plain(logits[0], suppress), abs=2e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("margin", [False, True])
def test_statistics_that_are_not_required_are_empty(module, entropy, margin):
    logits = logits_of(3, 9)
    found = module.numba_kernel(logits, torch.tensor([0, -1]), None, -1, entropy, margin)
    assert [len(each) for each in found] == [2, 2, 2 * entropy, 2 * margin]
    wanted = plain(logits[0], -1)
    for each, value in zip(found, wanted, strict=True):
        assert not len(each) or each.tolist() == pytest.approx([value, 0], abs=2e-6)


@pytest.mark.parametrize("suppress", [-1, 0, 1, 4])
def test_rows_without_numbers(module, suppress):
    def run(logits, suppress):
        return module.numba_kernel(logits, None, None, suppress, True, True)

    check_rows_without_numbers(run, suppress)


def test_one_column_that_is_suppressed(module):
    x0, *others = module.numba_kernel(torch.zeros(1, 1), None, None, 0, True, True)
    assert x0.tolist() == [0]
    assert all(each.isnan().all() for each in others)
    found = module.numba_kernel(torch.zeros(1, 1), None, None, -1, True, True)
    assert values_of(found, 0) == [0, 1, 0, 1]
    two = torch.full((1, 2), -torch.inf)
    for suppress, x0 in ((0, 1), (1, 0), (-1, 0)):
        assert module.numba_kernel(two, None, None, suppress, False, False)[0].tolist() == [x0]


def test_a_token_that_is_suppressed_has_no_probability(module):
    found = module.numba_kernel(logits_of(2, 6), None, torch.tensor([4, 1]), 4, False, False)
    assert found[0].tolist() == [4, 1]
    assert found[1][0] == 0 < found[1][1]


def test_powers_of_two_are_accurate(module):
    for x in [*np.linspace(-126, 0, 4001, dtype=np.float32), np.float32(-1e-7)]:
        value, wanted = float(module._power_of_2(x)), 2.0 ** float(x)
        assert abs(value - wanted) <= 2.5e-7 * wanted, x
    assert module._power_of_2(np.float32(0)) == 1


def test_powers_far_below_the_maximum_are_zero(module):
    """The sums are then those of the maximum alone."""
    for gap in (90.0, 200.0, 3e38, float("inf")):
        logits = torch.tensor([[0.0, -gap, -gap]])
        found = module.numba_kernel(logits, None, None, -1, True, True)
        assert values_of(found, 0) == pytest.approx([0, 1, 0, 1], abs=1e-6)
        assert float(module.numba_kernel(logits, None, None, -1, False, False)[1]) == 1


def test_any_layout_is_read_and_only_the_rows_of_the_view(module):
    wide_ = logits_of(4, 30)
    wanted = module.numba_kernel(wide_[1:, 10:20].contiguous(), None, None, -1, True, True)
    for view in (wide_[1:, 10:20], wide_[1:, 10:20].t().contiguous().t()):
        found = module.numba_kernel(view, None, None, -1, True, True)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_every_other_column(module):
    logits = logits_of(3, 20)
    found = module.numba_kernel(logits[:, ::2], None, None, -1, True, True)
    for at in range(3):
        assert values_of(found, at) == pytest.approx(plain(logits[at, ::2], -1), abs=2e-6)


def test_an_error_in_a_thread_is_raised(module, monkeypatch):
    class Helper:
        def submit(self, work):
            return self

        def result(self):
            raise MemoryError("no room")

    monkeypatch.setattr(module, "_PIECE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    module._pool = lambda count: Helper()
    with pytest.raises(MemoryError, match="no room"):
        module.numba_kernel(logits_of(3, 5), None, None, -1, False, False)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("piece", [1, 20, 45, 1000])
def test_threads_share_the_rows(module, threads, piece, monkeypatch):
    logits = logits_of(7, 10)
    wanted = module.numba_kernel(logits, None, None, -1, True, True)
    monkeypatch.setattr(module, "_PIECE", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    used = []
    real = module._pool
    module._pool = lambda count: used.append(count) or real(count)
    found = module.numba_kernel(logits, None, None, -1, True, True)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    pieces = -(-7 // max(1, piece // 10))
    assert used == [threads] * (min(threads, pieces) - 1)


def test_rows_and_tokens_that_do_not_exist_are_refused(module):
    logits = logits_of(3, 5)
    with pytest.raises(IndexError, match="row 3 of 3"):
        module.numba_kernel(logits, torch.tensor([0, 3]), None, -1, False, False)
    with pytest.raises(IndexError, match="token 5 of 5"):
        module.numba_kernel(logits, None, torch.tensor([0, 5, 1]), -1, False, False)
    last = module.numba_kernel(logits, torch.tensor([2]), torch.tensor([4]), -1, False, False)
    assert last[0].tolist() == [4]
    assert [len(each) for each in module.numba_kernel(logits[:0], None, None, -1, True, True)] == [
        0
    ] * 4


def test_compilation_is_announced_once(module, caplog):
    for _ in range(2):
        module._announcement.on_start(None)
        module._announcement.on_end(None)
    assert [record.getMessage() for record in caplog.records] == [
        "compiling the statistics kernel for this CPU, about two seconds, once"
    ]


def test_without_a_cache_folder_the_kernel_is_still_compiled(module, caplog, monkeypatch):
    asked = []

    def njit(function, **options):
        asked.append(options)
        if options.get("cache"):
            raise RuntimeError("no locator")
        return function

    monkeypatch.setattr(module, "njit", njit)
    assert module._compiled() is module._rows_of
    assert [options.pop("cache", None) for options in asked] == [True, None]
    assert asked == [{"nogil": True, "fastmath": module._FASTMATH}] * 2
    assert "not cached on disk: no locator" in caplog.text
