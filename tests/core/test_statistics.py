"""row_statistics against a float64 reference, and independent of what else is in the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins.statistics import row_statistics

EVERYTHING = frozenset({"confidence", "entropy", "margin"})


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
    return logits


@given(
    kind=st.sampled_from(["random", "ties", "some -inf", "one huge", "all equal"]),
    rows=st.integers(1, 9),
    vocabulary=st.sampled_from([2, 3, 97, 511, 512, 513, 5000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    suppressed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_a_float64_reference(kind, rows, vocabulary, dtype, suppressed, seed):
    logits = make_rows(kind, rows, vocabulary, seed).to(dtype)
    suppress = 1 if suppressed and vocabulary > 2 else None
    found = row_statistics(logits, EVERYTHING, suppress)
    wanted = reference(logits, suppress)
    assert torch.equal(found.x0, wanted["x0"])
    for name, tolerance in (("confidence", 1e-5), ("margin", 1e-5), ("entropy", 1e-4)):
        value = getattr(found, name)
        assert value.dtype == torch.float32
        assert (value.double() - wanted[name]).abs().max() < tolerance, name


@pytest.mark.parametrize("vocabulary", [97, 40_000, 157_184])
def test_a_row_does_not_depend_on_its_neighbours_to_the_bit(vocabulary):
    logits = make_rows("random", 7, vocabulary, 0)
    together = row_statistics(logits, EVERYTHING)
    for row in range(7):
        alone = row_statistics(logits[row : row + 1], EVERYTHING)
        for name in ("x0", "confidence", "entropy", "margin"):
            assert torch.equal(getattr(together, name)[row : row + 1], getattr(alone, name)), name


def test_what_is_not_required_is_not_computed():
    found = row_statistics(torch.randn(2, 5))
    assert found.entropy is None
    assert found.margin is None


def test_confidence_of_given_tokens():
    logits = make_rows("random", 4, 30, 1)
    tokens = torch.tensor([3, 0, 29, 7])
    found = row_statistics(logits, x0=tokens)
    wanted = logits.double().softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert torch.equal(found.x0, tokens)
    assert (found.confidence.double() - wanted).abs().max() < 1e-6


def test_one_row_of_given_tokens_in_a_long_chunk():
    logits = make_rows("random", 1, 600, 1)
    found = row_statistics(logits, x0=torch.tensor([5]))
    assert found.confidence.item() == pytest.approx(logits.softmax(-1)[0, 5].item(), abs=1e-6)


def test_nan_is_nan_and_stays_in_its_row():
    logits = make_rows("random", 3, 50, 0)
    logits[1, 7] = torch.nan
    found = row_statistics(logits, EVERYTHING)
    assert found.confidence.isnan().tolist() == [False, True, False]


def test_the_logits_are_not_changed():
    logits = make_rows("random", 3, 50, 0)
    before = logits.clone()
    row_statistics(logits, EVERYTHING, suppress=3)
    assert torch.equal(logits, before)


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="rows, vocabulary"):
        row_statistics(torch.randn(2, 3, 4))


def test_no_rows():
    found = row_statistics(torch.randn(0, 10), EVERYTHING)
    assert found.x0.shape == (0,)
