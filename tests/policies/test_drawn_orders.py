"""Policies that draw positions, against the lines of LLaDA's and Dream's code that draw them.

torch.rand and torch.multinomial, given a generator in the same state, draw what the policies draw.
"""

from __future__ import annotations

import math

import pytest
import torch

from l2pd_plugins import L2PDError, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText

BLOCKS, LENGTH, VOCABULARY, MASK, STEPS = 200, 12, 9, 8, 5


def certainty_of(name, probabilities):
    """What Dream's `sample_tokens` returns as confidence, (L,)."""
    if name == "dream_confidence":
        return probabilities.max(-1).values
    if name == "dream_margin":
        first, second = probabilities.topk(2).values.unbind(-1)
        return first - second
    return (probabilities * probabilities.clamp(min=1e-30).log()).sum(-1)


def lladas_choice(confidence, masked, count, twin):
    """LLaDA, generate.py: remasking == 'random', and torch.topk."""
    drawn = torch.where(masked, torch.rand(LENGTH, generator=twin), -torch.inf)
    return drawn.topk(count).indices


def dreams_choice(alg_temp):
    """Dream, generation_utils.py: torch.multinomial of the softmax of confidence / alg_temp."""

    def choose(confidence, masked, count, twin):
        full = torch.where(masked, confidence, -torch.inf) / alg_temp
        return torch.multinomial(full.softmax(-1), count, generator=twin)

    return choose


def lladas_count(masks, step):
    return LENGTH // STEPS + (step < LENGTH % STEPS)


def dreams_count(masks, step):
    times = [1 - (1 - 1e-3) * k / STEPS for k in range(STEPS + 1)]
    share = math.floor(masks * (1 - times[step + 1] / times[step])) if step < STEPS - 1 else masks
    return max(share, 1)


CASES = [
    ("random_order", {}, lladas_choice, lladas_count),
    *(
        (f"dream_{order}", {"alg_temp": t}, dreams_choice(t), dreams_count)
        for order in ("confidence", "margin", "entropy")
        for t in (0.2, 1.5)
    ),
]


@pytest.mark.parametrize(("name", "options", "choose", "count_of"), CASES)
def test_it_draws_what_the_authors_code_draws(name, options, choose, count_of):
    policy = create_policy(name, steps=STEPS, **options)
    logits = torch.Generator().manual_seed(len(name))
    base = torch.randn(BLOCKS, LENGTH, VOCABULARY, generator=logits)
    base[..., MASK] = -torch.inf
    batch = BlockBatch.start(
        torch.full((BLOCKS, LENGTH), MASK),
        [policy] * BLOCKS,
        mask_token_id=MASK,
        canvas_length=torch.full((BLOCKS,), LENGTH),
        generators=[torch.Generator().manual_seed(row) for row in range(BLOCKS)],
    )
    twins = [torch.Generator().manual_seed(row) for row in range(BLOCKS)]
    certain = unlike = 0
    for step in range(STEPS):
        noisy = base + torch.randn(base.shape, generator=logits)
        before = batch.masked.clone()
        outcome = denoising_step(batch, noisy, end_of_text=EndOfText("off", ()))
        for row in range(BLOCKS):
            masked = before[row]
            count = count_of(int(masked.sum()), step)
            confidence = certainty_of(name, noisy[row].softmax(-1))
            wanted = choose(confidence, masked, count, twins[row])
            found = outcome.committed[row].nonzero().flatten()
            assert sorted(found.tolist()) == sorted(wanted.tolist()), (step, row)
            certain += 1
            ranked = torch.where(masked, confidence, -torch.inf).topk(count).indices
            unlike += set(ranked.tolist()) != set(found.tolist())
    assert not batch.masked.any()
    assert unlike > certain / 4  # they were drawn


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random_order", {}, "random_order draws positions at random: pass a seed"),
        ("dream_margin", {"alg_temp": 0.1}, "pass a seed, or leave alg_temp out"),
    ],
)
def test_without_a_seed_it_asks_for_one(name, options, message):
    batch = BlockBatch.start(
        torch.full((1, LENGTH), MASK), [create_policy(name, **options)], mask_token_id=MASK
    )
    with pytest.raises(L2PDError, match=message):
        denoising_step(batch, torch.zeros(1, LENGTH, VOCABULARY), end_of_text=EndOfText("off", ()))


@pytest.mark.parametrize("value", [0, -1, 0.00009, float("nan"), 1001, "hot"])
def test_a_temperature_that_cannot_be_is_refused(value):
    with pytest.raises(L2PDError, match="alg_temp"):
        create_policy("dream_entropy", alg_temp=value)
