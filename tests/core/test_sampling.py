"""What a row draws: a function of its seed, position, step and logits, from the right distribution.

The references are written here: SplitMix64 in whole numbers of Python, the filters in float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2pd_plugins import sampling
from l2pd_plugins.sampling import (
    RowSampling,
    Sampling,
    log_probabilities,
    sample_tokens,
    top_log_probabilities,
)

LENGTH, VOCABULARY, MASK = 4, 12, 11
CPU = torch.device("cpu")
U64 = (1 << 64) - 1


def mixed(value: int) -> int:
    value &= U64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & U64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & U64
    return value ^ (value >> 31)


def uniform(seed: int, position: int, step: int, token: int) -> float:
    golden = 0x9E3779B97F4A7C15
    key = mixed(mixed(mixed(seed + golden) + position) + step)
    return ((mixed(key + token * golden) >> 33) + 0.5) / 2**31


def kept(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """float64 probabilities of one row (V,), after all filters."""
    scores = logits.astype(np.float64) / how.temperature
    order = np.argsort(-scores)
    p = np.exp(scores - scores.max())
    allowed = np.ones(len(p), dtype=bool)
    if how.top_k:
        allowed[order[how.top_k :]] = False
    p = np.where(allowed, p, 0)
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    allowed[order[before >= how.top_p]] = False
    allowed &= p >= how.min_p * p.max()
    p = np.where(allowed, p, 0)
    return p / p.sum()


def draw(logits, rows, *, blocks=None, steps=None, length=LENGTH, suppress=None, places=None):
    """The draws (B, L) of blocks whose logits are (B, L, V)."""
    batch = len(logits)
    zeros = torch.zeros(batch, dtype=torch.int64)
    found = sample_tokens(
        logits.flatten(0, 1),
        None,
        places,
        RowSampling.of(rows, CPU),
        masked=torch.ones(batch, length, dtype=torch.bool),
        when=(
            zeros if blocks is None else torch.tensor(blocks),
            zeros if steps is None else torch.tensor(steps),
        ),
        suppress=suppress,
    )
    return found.view(batch, length)


def some_logits(batch: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, LENGTH, vocabulary, generator=generator) * 2


HOW = st.builds(
    Sampling,
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 3, 2000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
)


@settings(max_examples=60, deadline=None)
@given(HOW, st.integers(0, 9), st.integers(0, 40), st.integers(0, 40))
def test_a_draw_is_the_highest_of_the_logits_plus_the_gumbel_noise_of_its_place(
    how, seed, block, step
):
    logits = some_logits(1, seed)
    found = draw(logits, [how], blocks=[block], steps=[step])[0].tolist()
    for column, token in enumerate(found):
        p = kept(logits[0, column].numpy(), how)
        with np.errstate(divide="ignore"):
            scores = np.log(p)
        position = block * LENGTH + column
        noise = [uniform(how.seed, position, step, each) for each in range(VOCABULARY)]
        scores -= np.log(-np.log1p(-np.array(noise)))
        assert scores[token] > scores.max() - 1e-4


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
        {"top_k": 2000, "top_p": 0.95},
    ],
    ids=str,
)
def test_draws_have_the_distribution_of_the_filtered_softmax(how):
    logits = some_logits(1, 5)[:, :1]
    count, rows = 20_000, 1000
    many = logits.expand(rows, count // rows, VOCABULARY).reshape(rows, -1, VOCABULARY)
    found = draw(
        many,
        [Sampling(seed, **how) for seed in range(rows)],
        length=count // rows,
        steps=[*range(rows)],
    )
    seen = np.bincount(found.flatten().numpy(), minlength=VOCABULARY)
    p = kept(logits[0, 0].numpy(), Sampling(0, **how))
    assert (seen[p == 0] == 0).all()
    likely = p * count > 5
    chi = ((seen - p * count)[likely] ** 2 / (p * count)[likely]).sum()
    assert chi < likely.sum() + 5 * math.sqrt(2 * likely.sum())  # about five deviations


@pytest.mark.parametrize("varied", ["seed", "position", "step"])
def test_draws_of_neighbouring_seeds_positions_and_steps_are_independent(varied):
    count, vocabulary = 4000, 8
    flat = torch.zeros(count, 1, vocabulary)
    rows = [Sampling(at if varied == "seed" else 7) for at in range(count)]
    drawn = draw(
        flat,
        rows,
        length=1,
        blocks=[at if varied == "position" else 3 for at in range(count)],
        steps=[at if varied == "step" else 5 for at in range(count)],
    )
    tokens = drawn[:, 0].numpy()
    for distance in (1, 2, 64):
        pairs = tokens[:-distance] * vocabulary + tokens[distance:]
        seen = np.bincount(pairs, minlength=vocabulary**2)
        expected = len(pairs) / vocabulary**2
        chi = ((seen - expected) ** 2 / expected).sum()
        assert abs(chi - 63) < 5 * math.sqrt(2 * 63)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.none() | HOW, min_size=2, max_size=6), st.randoms(), st.integers(0, 2))
def test_a_row_draws_the_same_in_every_batch(rows, random, kind):
    vocabulary = [VOCABULARY, 1500, 40_000][kind]
    logits = some_logits(len(rows), 3, vocabulary).bfloat16().float()  # many equal logits
    blocks, steps = [*range(len(rows))], [2 * at for at in range(len(rows))]
    alone = torch.cat(
        [
            draw(logits[at : at + 1], [row], blocks=[at], steps=[2 * at])
            if row
            else torch.full((1, LENGTH), -1)
            for at, row in enumerate(rows)
        ]
    )
    order = [*range(len(rows))]
    random.shuffle(order)
    if any(rows):
        together = draw(
            logits[order],
            [rows[at] for at in order],
            blocks=[blocks[at] for at in order],
            steps=[steps[at] for at in order],
        )
        assert torch.equal(together, alone[order])


@pytest.mark.parametrize("elements", [1, 3 * VOCABULARY, 1 << 20])
def test_the_size_of_a_chunk_does_not_change_a_draw(monkeypatch, elements):
    logits, rows = some_logits(3), [Sampling(1, top_p=0.9), Sampling(2), Sampling(3, top_k=4)]
    wanted = draw(logits, rows)
    monkeypatch.setitem(sampling._ELEMENTS, "cpu", elements)
    assert torch.equal(draw(logits, rows), wanted)


@pytest.mark.parametrize("mask", [0, MASK])
@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e30])
def test_the_suppressed_token_is_never_drawn(mask, temperature):
    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[..., mask] = 1e9
    logits[0, 0] = -torch.inf
    logits[0, 1] = torch.nan
    logits[0, 2, 1] = torch.inf
    for seed in range(30):
        found = draw(logits, [Sampling(seed, temperature)], suppress=mask)
        assert not (found == mask).any()
        assert ((found >= 0) & (found < VOCABULARY)).all()


@pytest.mark.parametrize("how", [{"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-320}])
def test_the_most_restrictive_settings_take_the_argmax(how):
    logits = some_logits(6, 2)
    logits[0, 0] = -torch.inf
    logits[0, 0, 4], logits[0, 0, 7] = 1e9, 2e9
    found = draw(logits, [Sampling(seed, **how) for seed in range(6)])
    assert torch.equal(found, logits.argmax(-1))


def test_a_position_that_is_not_to_be_drawn_draws_nothing_and_changes_no_other():
    logits, rows = some_logits(2), [Sampling(1), Sampling(2, top_k=3)]
    every = draw(logits, rows).flatten().tolist()
    places = [-1 if at % 3 == 0 else at for at in range(2 * LENGTH)]
    some = draw(logits, rows, places=places).flatten().tolist()
    assert some == [-1 if at % 3 == 0 else token for at, token in enumerate(every)]


@pytest.mark.parametrize("distinct", [False, True])
def test_the_number_of_operators_does_not_grow_with_the_rows(distinct):
    def operators(rows):
        samplings = [
            Sampling(at, 1 + (at % 7) / 10 * distinct, top_k=5 + at * distinct)
            for at in range(rows)
        ]
        logits = torch.zeros(rows, LENGTH, VOCABULARY)
        with torch.profiler.profile() as profile:
            draw(logits, samplings)
        return sum(each.count for each in profile.key_averages())

    operators(2)
    assert operators(200) <= operators(2) + 8


@pytest.mark.parametrize("suppress", [None, 3])
@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_the_most_probable_tokens(monkeypatch, suppress, elements):
    monkeypatch.setitem(sampling._ELEMENTS, "cpu", elements)
    logits = some_logits(2, 4).flatten(0, 1)
    rows = torch.tensor([6, 0, 3])
    ids, values = top_log_probabilities(logits, rows, 5, suppress)
    exact = logits.double()
    if suppress is not None:
        exact[:, suppress] = -torch.inf
    wanted = exact.log_softmax(-1)[rows].sort(descending=True)
    assert torch.equal(ids, wanted.indices[:, :5])
    torch.testing.assert_close(values.double(), wanted.values[:, :5], rtol=0, atol=1e-5)
    every = top_log_probabilities(logits, rows, 10**6, suppress)
    assert every[0].shape == (3, VOCABULARY) and every[1].isfinite().all()


def test_log_probabilities_are_finite():
    found = log_probabilities(torch.tensor([0.0, 1e-45, 0.5, 1.0]))
    assert found.tolist() == pytest.approx([-87.3365, -87.3365, math.log(0.5), 0.0])
