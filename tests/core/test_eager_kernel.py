"""The kernel in plain PyTorch: the same numbers for any size of its buffer."""

from __future__ import annotations

import pytest
import torch

from l2pd_plugins.statistics import eager
from tests.core.plain_statistics import logits_of, plain

NAMES = ("x0", "confidence", "entropy", "margin")


@pytest.mark.parametrize("room", [1, 2048, 1 << 18])
@pytest.mark.parametrize("vocabulary", [2, 129, 512, 1300])
@pytest.mark.parametrize("suppress", [-1, 0, 1])
def test_every_row_has_its_own_statistics(room, vocabulary, suppress, monkeypatch):
    monkeypatch.setattr(eager, "_CPU_BUFFER", room)
    logits = logits_of(5, vocabulary)
    if vocabulary == 2:
        logits = torch.cat([logits, logits[:, :1] - 1], dim=1)  # one more than may be suppressed
    rows, tokens = torch.tensor([4, -1, 0, 3, 3, 1]), torch.tensor([-1, 2, 0, 1, -1, 1])
    for which, given in ((rows, tokens), (rows, None), (None, tokens[:5]), (None, None)):
        found = eager.eager_kernel(logits, which, given, suppress, True, True)
        places = range(5) if which is None else which.tolist()
        chosen = [-1] * len(places) if given is None else given.tolist()
        for at, (row, token) in enumerate(zip(places, chosen, strict=True)):
            values = [float(each[at]) for each in found]
            wanted = [0] * 4 if row < 0 else plain(logits[row], suppress, token)
            assert values == pytest.approx(wanted, abs=1e-5), (at, row, token)


@pytest.mark.parametrize("room", [1, 1 << 18])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("margin", [False, True])
def test_statistics_that_are_not_required_are_empty(room, entropy, margin, monkeypatch):
    monkeypatch.setattr(eager, "_CPU_BUFFER", room)
    found = eager.eager_kernel(logits_of(5, 700), None, None, -1, entropy, margin)
    assert [len(each) for each in found] == [5, 5, 5 * entropy, 5 * margin]
    everything = eager.eager_kernel(logits_of(5, 700), None, None, -1, True, True)
    for name, part, whole in zip(NAMES, found, everything, strict=True):
        assert not len(part) or torch.allclose(part, whole, atol=1e-6), name


def test_one_row_alone_has_the_same_bits_as_in_a_batch(monkeypatch):
    logits = logits_of(9, 40_000)
    whole = eager.eager_kernel(logits, None, None, -1, True, True)
    for room in (1, 90_000, 1 << 20):
        monkeypatch.setattr(eager, "_CPU_BUFFER", room)
        for count in (1, 2, 3, 9):
            part = eager.eager_kernel(logits[:count], None, None, -1, True, True)
            for name, one, all_ in zip(NAMES, part, whole, strict=True):
                assert torch.equal(one, all_[:count]), (name, room, count)


@pytest.mark.parametrize("vocabulary", [600, 512])
def test_minus_infinity_adds_nothing(vocabulary):
    logits = torch.full((2, vocabulary), -torch.inf)
    logits[0, 5], logits[0, 9] = 1.0, 1.0
    logits[1, 7] = 3.0
    x0, confidence, entropy, margin = eager.eager_kernel(logits, None, None, -1, True, True)
    assert x0.tolist() == [5, 7]
    assert confidence.tolist() == [0.5, 1.0]
    assert entropy.tolist() == pytest.approx([0.6931472, 0.0])
    assert margin.tolist() == [0.0, 1.0]


def test_the_buffer_is_float32_for_any_default_dtype():
    logits = logits_of(3, 700)
    wanted = eager.eager_kernel(logits, None, None, -1, True, True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = eager.eager_kernel(logits, None, None, -1, True, True)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_large_buffer_on_another_device():
    logits = torch.empty(40_000, 2000, dtype=torch.bfloat16, device="meta")
    found = eager.eager_kernel(logits, None, None, -1, True, True)
    assert [each.shape for each in found] == [(40_000,)] * 4


def test_no_rows():
    found = eager.eager_kernel(torch.empty(0, 700), None, None, -1, True, True)
    assert [each.shape for each in found] == [(0,)] * 4


def test_a_row_of_only_minus_infinity_predicts_a_column_that_is_not_suppressed():
    for vocabulary, suppress, x0 in ((5, 0, 1), (5, 1, 0), (5, -1, 0), (2, 0, 1), (1, 0, 0)):
        logits = torch.full((2, vocabulary), -torch.inf)
        found = eager.eager_kernel(logits, None, None, suppress, False, False)
        assert found[0].tolist() == [x0] * 2
        assert found[1].isnan().all()
