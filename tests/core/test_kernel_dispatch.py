"""Which kernel computes the statistics, at every boundary of the dispatch."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.statistics import dispatch, row_statistics
from l2pd_plugins.statistics._buffers import empty_results

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VARIABLE = "L2PD_STATISTICS"


@pytest.fixture(autouse=True)
def everything_installed(monkeypatch):
    for name in (VARIABLE, "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "_INSTALLED", {"numba": True, "triton": True})
    dispatch._announce.cache_clear()


def test_numba_is_chosen_for_8192_columns_or_more(caplog):
    chosen = [dispatch.choose(CPU, torch.float32, columns) for columns in (8191, 8192, 8193)]
    assert chosen == ["eager", "numba", "numba"]
    assert dispatch.choose(torch.device("meta"), torch.float32, 9000) == "eager"
    assert not caplog.records  # no faster kernel could have been expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_the_fused_kernels_read_all_dtypes_of_logits(dtype, device):
    assert dispatch.choose(device, dtype, 9000) == {"cpu": "numba", "cuda": "triton"}[device.type]


def test_the_argument_takes_precedence_over_the_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, "eager")
    assert dispatch.choose(CPU, torch.float32, 9000) == "eager"
    assert dispatch.choose(CPU, torch.float32, 9000, "numba") == "numba"
    monkeypatch.setenv(VARIABLE, "")
    assert dispatch.choose(CPU, torch.float32, 9000) == "numba"


def test_an_unavailable_kernel_gives_the_reason(monkeypatch):
    def refused(kernel, device=CPU, dtype=torch.float32):
        with pytest.raises(L2PDError) as got:
            dispatch.choose(device, dtype, 9000, kernel)
        return str(got.value)

    assert refused("quick") == "statistics kernel 'quick': the kernels are triton, numba, eager"
    assert refused("numba", CUDA) == "statistics kernel 'numba': it runs on cpu, not on cuda"
    assert refused("triton") == "statistics kernel 'triton': it runs on cuda, not on cpu"
    assert refused("numba", dtype=torch.float64).endswith(
        "it reads bfloat16, float16 and float32, not torch.float64"
    )
    monkeypatch.setattr(dispatch, "_INSTALLED", {"numba": False, "triton": False})
    assert refused("numba").endswith("numba is not installed; pip install 'l2pd-plugins[cpu]'")
    assert refused("triton").endswith("triton is not installed; pip install triton")


def test_triton_runs_on_the_cpu_only_in_its_interpreter(monkeypatch):
    for value, device in (("0", CPU), ("1", torch.device("meta"))):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        with pytest.raises(L2PDError, match="it runs on cuda"):
            dispatch.choose(device, torch.float32, 9000, "triton")
    assert dispatch.choose(CPU, torch.float32, 9000, "triton") == "triton"
    assert dispatch.choose(CPU, torch.float32, 9000) == "numba"
    assert dispatch.choose(CUDA, torch.float32, 9000, "triton") == "triton"


def test_installed_packages_are_detected():
    spec = importlib.util.spec_from_file_location("fresh_dispatch", dispatch.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    found = fresh._INSTALLED
    assert found.keys() == {"triton", "numba"}
    assert all(there == (importlib.util.find_spec(n) is not None) for n, there in found.items())


def test_the_slower_kernel_is_announced_once_and_never_to_a_compiler(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.choose(CPU, torch.float64, 9000) == "eager"
    assert not caplog.records
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    for _ in range(2):
        assert dispatch.choose(CPU, torch.float64, 9000) == "eager"
    assert [record.getMessage() for record in caplog.records] == [
        "statistics of the logits: using the slower eager kernel, since 'numba' is unavailable: it "
        "reads bfloat16, float16 and float32, not torch.float64"
    ]


def test_eager_reads_dtypes_that_no_other_kernel_reads():
    logits = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    for kernel in ("eager", None):
        found = row_statistics(logits, frozenset({"margin"}), kernel=kernel)
        assert found.x0.tolist() == [1]
        assert found.confidence.item() == pytest.approx(0.6652409)
        assert found.margin.item() == pytest.approx(0.6652409 - 0.2447285)
        assert found.entropy is None


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("margin", [False, True])
def test_buffers_are_allocated_only_for_required_statistics(entropy, margin):
    logits = torch.empty(5, 7, dtype=torch.bfloat16)
    for rows, count in ((None, 5), (torch.zeros(3, dtype=torch.int64), 3)):
        found = empty_results(logits, rows, entropy, margin)
        assert [each.shape for each in found] == [
            (count,),
            (count,),
            (count if entropy else 0,),
            (count if margin else 0,),
        ]
        assert [each.dtype for each in found] == [torch.int64, *[torch.float32] * 3]
    there = empty_results(logits.to("meta"), None, entropy, margin)
    assert {each.device.type for each in there} == {"meta"}


def test_the_module_exports_the_names_of_all():
    found: dict = {}
    exec("from l2pd_plugins.statistics import *", found)
    assert found["row_statistics"] is row_statistics
    assert (found["KERNELS"], found["ENVIRONMENT"]) == (dispatch.KERNELS, VARIABLE)
    assert "RowStatistics" in found


def test_a_suppressed_token_is_not_predicted():
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    assert row_statistics(logits, kernel="eager").margin is None
    for suppress, predicted in ((None, 1), (1, 2), (2, 1)):
        assert row_statistics(logits, suppress=suppress, kernel="eager").x0.tolist() == [predicted]
