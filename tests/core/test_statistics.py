"""row_statistics by every kernel: equal to a float64 reference and independent of the batch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.statistics import ENVIRONMENT, KERNELS, RowStatistics, dispatch, row_statistics

EVERYTHING = frozenset({"confidence", "entropy", "margin"})
NAMES = ("x0", "confidence", "entropy", "margin")
KINDS = ["random", "ties", "some -inf", "one huge", "all equal", "descending"]
DEVICES = {
    "eager": "cpu",
    "numba": "cpu",
    "triton": "cuda" if torch.cuda.is_available() else "cpu",  # in its interpreter
}

# Warnings of Triton's interpreter about NaN and infinity, which these tests use.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param != "eager":
        pytest.importorskip(request.param)
    return request.param


def run(kernel: str, logits: torch.Tensor, *args, **kwargs) -> RowStatistics:
    """row_statistics by one kernel on its device; the results are moved to the CPU."""
    device = DEVICES[kernel]
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    found = row_statistics(logits.to(device), *args, kernel=kernel, **kwargs)
    values = {name: getattr(found, name) for name in NAMES}
    return replace(found, **{k: v.cpu() for k, v in values.items() if v is not None})


def reference(logits: torch.Tensor, suppress: int | None) -> dict[str, torch.Tensor]:
    wide = logits.double().clone()
    if suppress is not None:
        wide[:, suppress] = -torch.inf
    p = wide.softmax(-1)
    two = p.topk(2, -1).values
    return {
        "x0": wide.argmax(-1),
        "confidence": two[:, 0],
        "margin": two[:, 0] - two[:, 1],
        "entropy": torch.special.entr(p).sum(-1),
    }


def make_rows(kind: str, rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * 4
    if kind == "ties":
        logits = logits.round()
    elif kind == "some -inf":
        logits[torch.rand(rows, vocabulary, generator=generator) < 0.5] = -torch.inf
        logits[:, -1] = 0.0
        logits[:, 0] = 1.0
    elif kind == "one huge":
        logits[:, vocabulary // 2] = 3e4
    elif kind == "all equal":
        logits[:] = 1.5
    elif kind == "descending":
        logits = logits.sort(-1, descending=True).values
    return logits


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 9),
    vocabulary=st.sampled_from([2, 3, 97, 511, 512, 513, 1025, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    suppressed=st.sampled_from([None, 0, 1, -1]),
    seed=st.integers(0, 1000),
)
def test_equals_a_float64_reference(kernel, kind, rows, vocabulary, dtype, suppressed, seed):
    logits = make_rows(kind, rows, vocabulary, seed).to(dtype)
    suppress = None if suppressed is None or vocabulary == 2 else suppressed % vocabulary
    found = run(kernel, logits, EVERYTHING, suppress)
    wanted = reference(logits, suppress)
    assert torch.equal(found.x0, wanted["x0"])
    for name, tolerance in (("confidence", 1e-5), ("margin", 1e-5), ("entropy", 1e-4)):
        value = getattr(found, name)
        assert value.dtype == torch.float32
        assert (value.double() - wanted[name]).abs().max() < tolerance, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference_at_a_real_vocabulary(kernel, dtype):
    logits = make_rows("random", 3, 157_184, 0).to(dtype)
    found, wanted = run(kernel, logits, EVERYTHING, 156_895), reference(logits, 156_895)
    assert torch.equal(found.x0, wanted["x0"])
    assert (found.confidence.double() - wanted["confidence"]).abs().max() < 1e-5
    assert (found.margin.double() - wanted["margin"]).abs().max() < 1e-5
    assert (found.entropy.double() - wanted["entropy"]).abs().max() < 1e-4


@pytest.mark.parametrize("vocabulary", [97, 40_000, 157_184])
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit(kernel, vocabulary):
    logits = make_rows("random", 7, vocabulary, 0)
    together = run(kernel, logits, EVERYTHING)
    for row in range(7):
        alone = run(kernel, logits[row : row + 1], EVERYTHING)
        for name in NAMES:
            assert torch.equal(getattr(together, name)[row : row + 1], getattr(alone, name)), name


def test_some_rows_of_the_logits_equal_those_rows_alone(kernel):
    logits = make_rows("random", 6, 700, 0)
    rows = torch.tensor([4, -1, 0, 4])
    found = run(kernel, logits, EVERYTHING, rows=rows)
    wanted = run(kernel, logits[[4, 0, 0, 4]], EVERYTHING)
    for name in NAMES:
        value = getattr(found, name)
        assert value[1] == 0
        assert torch.equal(value[[0, 2, 3]], getattr(wanted, name)[[0, 2, 3]]), name


def test_logits_in_any_layout(kernel):
    wide = make_rows("random", 4, 600, 0)
    wanted = run(kernel, wide[:, 100:500].contiguous(), EVERYTHING)
    for logits in (wide[:, 100:500], wide[:, 100:500].t().contiguous().t()):
        found = run(kernel, logits, EVERYTHING)
        assert all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in NAMES)


def test_statistics_that_are_not_required_are_not_computed(kernel):
    found = run(kernel, torch.randn(2, 5))
    assert found.entropy is None
    assert found.margin is None


def test_other_required_statistics_change_nothing(kernel):
    logits = make_rows("random", 3, 3000, 5)
    plain, all_ = run(kernel, logits), run(kernel, logits, EVERYTHING)
    assert torch.equal(plain.x0, all_.x0)
    assert (plain.confidence - all_.confidence).abs().max() < 1e-6


def test_confidence_of_given_tokens(kernel):
    logits = make_rows("random", 4, 30, 1)
    tokens = torch.tensor([3, 0, -1, 7])
    found = run(kernel, logits, suppress=7, x0=tokens)
    tokens[2] = logits[2].index_fill(0, torch.tensor(7), -torch.inf).argmax()
    logits[:, 7] = -torch.inf
    wanted = logits.double().softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert torch.equal(found.x0, tokens)
    assert (found.confidence.double() - wanted).abs().max() < 1e-6
    assert found.confidence[3] == 0


def test_one_row_of_given_tokens_in_a_long_chunk(kernel):
    logits = make_rows("random", 1, 600, 1)
    found = run(kernel, logits, x0=torch.tensor([5]))
    assert found.confidence.item() == pytest.approx(logits.softmax(-1)[0, 5].item(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
@pytest.mark.parametrize("place", [0, 7, 1999])
def test_nan_is_nan_and_stays_in_its_row(kernel, dtype, nan, place):
    logits = make_rows("random", 3, 2000, 0).to(dtype)
    logits[1, place] = nan
    found = run(kernel, logits, EVERYTHING)
    for name in ("confidence", "entropy", "margin"):
        assert getattr(found, name).isnan().tolist() == [False, True, False], name
    assert 0 <= found.x0[1] < 2000


def test_rows_of_only_minus_infinity_are_nan(kernel):
    logits = torch.full((2, 600), -torch.inf)
    logits[1, 5] = 0.0
    found = run(kernel, logits, EVERYTHING)
    assert found.confidence.isnan().tolist() == [True, False]
    assert (found.confidence[1], found.margin[1]) == (1, 1)
    assert abs(found.entropy[1]) < 1e-30


def test_the_logits_are_not_changed(kernel):
    logits = make_rows("random", 3, 50, 0)
    before = logits.clone()
    run(kernel, logits, EVERYTHING, suppress=3)
    assert torch.equal(logits, before)


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="rows, vocabulary"):
        row_statistics(torch.randn(2, 3, 4))


def test_no_rows(kernel):
    found = run(kernel, torch.randn(0, 10), EVERYTHING)
    assert found.x0.shape == (0,)


def test_rows_and_tokens_that_do_not_exist_are_refused():
    pytest.importorskip("numba")
    logits = torch.randn(3, 9000)
    for name in ("eager", "numba"):
        with pytest.raises(IndexError):
            row_statistics(logits, rows=torch.tensor([0, 3]), kernel=name)
    with pytest.raises(IndexError, match="token 9000 of 9000"):
        row_statistics(logits, x0=torch.tensor([0, 9000, 1]), kernel="numba")


def test_threads_may_call_at_the_same_time():
    pytest.importorskip("numba")
    logits = [make_rows("random", 40, 20_000, seed) for seed in range(6)]
    wanted = [row_statistics(one, EVERYTHING, kernel="numba") for one in logits]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda one: row_statistics(one, EVERYTHING, kernel="numba"), logits))
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES)


def test_a_forked_process_may_call_too():
    pytest.importorskip("numba")
    source = """
import os, torch
from l2pd_plugins.statistics import row_statistics
torch.set_num_threads(2)
logits = torch.randn(200, 20_000)
wanted = row_statistics(logits, kernel="numba").confidence
child = os.fork()
if child == 0:
    found = row_statistics(logits, kernel="numba").confidence
    os._exit(0 if torch.equal(found, wanted) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", source], timeout=300).returncode == 0


# Which kernel


def choose(device="cpu", dtype=torch.bfloat16, vocabulary=150_000, asked=None):
    return dispatch.choose(torch.device(device), dtype, vocabulary, asked)


@pytest.fixture
def without(monkeypatch):
    """A function that makes a package count as not installed."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    dispatch._announce.cache_clear()
    return lambda package: monkeypatch.setitem(dispatch._INSTALLED, package, False)


def test_the_fastest_kernel_is_chosen_by_device_and_vocabulary(without):
    pytest.importorskip("numba")
    pytest.importorskip("triton")
    assert choose() == "numba"
    assert choose(vocabulary=100) == "eager"
    assert choose("cuda", vocabulary=100) == "triton"
    assert choose("meta") == "eager"


@pytest.mark.parametrize(("package", "device"), [("numba", "cpu"), ("triton", "cuda")])
def test_a_missing_kernel_is_announced_once_and_an_error_if_selected(
    without, package, device, caplog
):
    without(package)
    with caplog.at_level(logging.WARNING):
        assert [choose(device), choose(device)] == ["eager", "eager"]
    assert [package in record.getMessage() for record in caplog.records] == [True]
    assert "pip install" in caplog.text
    with pytest.raises(L2PDError, match=f"{package} is not installed"):
        choose(device, asked=package)


def test_a_dtype_that_only_eager_reads_is_announced(without, caplog):
    pytest.importorskip("numba")
    with caplog.at_level(logging.WARNING):
        assert choose(dtype=torch.float64) == "eager"
    assert "float64" in caplog.text


def test_a_kernel_is_selected_by_name(without, monkeypatch):
    assert choose(asked="eager") == "eager"
    monkeypatch.setenv(ENVIRONMENT, "eager")
    assert choose() == "eager"
    monkeypatch.setenv(ENVIRONMENT, "fastest")
    with pytest.raises(L2PDError, match=r"'fastest'.*triton, numba, eager"):
        row_statistics(torch.randn(2, 5))
    pytest.importorskip("numba")
    with pytest.raises(L2PDError, match=r"'numba'.*not on cuda"):
        choose("cuda", asked="numba")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pytest.importorskip("triton")
    with pytest.raises(L2PDError, match=r"'triton'.*not on cpu"):
        choose(asked="triton")


def test_compilation_is_announced_and_cached_on_disk(tmp_path):
    pytest.importorskip("numba")
    source = (
        "import torch; from l2pd_plugins.statistics import row_statistics; "
        "row_statistics(torch.randn(2, 9000), kernel='numba')"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = [
        subprocess.run(
            [sys.executable, "-c", source],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        ).stderr
        for _ in range(2)
    ]
    assert said[0].count("compiling the statistics kernel") == 1
    assert "compiling" not in said[1]


# Inside torch.compile and tracers


def test_a_kernel_runs_on_fake_tensors_without_reading_a_value(kernel):
    with FakeTensorMode():
        found = row_statistics(
            torch.empty(5, 9000, device=DEVICES[kernel]),
            EVERYTHING,
            3,
            rows=torch.empty(4, dtype=torch.int64, device=DEVICES[kernel]),
            kernel=kernel,
        )
    assert [getattr(found, name).shape for name in NAMES] == [(4,)] * 4


def test_a_kernel_compiles_to_one_graph(kernel):
    logits = make_rows("random", 4, 9000, 0).to(DEVICES[kernel])

    def both(logits):
        found = row_statistics(logits, EVERYTHING, 3, kernel=kernel)
        return found.x0, found.confidence, found.entropy, found.margin

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(logits), both(logits), strict=True):
        assert torch.equal(found, wanted)
