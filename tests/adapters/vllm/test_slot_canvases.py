"""Requests in vLLM's slots, tested without vLLM: their places in the canvas and their output.

The model here is a table: its prediction depends only on the request and the position, so that the
answer is known without decoding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2pd_adapters.vllm.slot_canvases import BidirectionalCanvases, BlockCausalCanvases, Canvases
from l2pd_plugins import UnmaskPolicy, create_policy
from l2pd_plugins.block_layout import BlockLayout
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.slots import SlotBatch

SLOTS, VOCABULARY, MASK, EOT = 4, 13, 12, 11
END = EndOfText("block", (EOT,))
KINDS = (BlockCausalCanvases, BidirectionalCanvases)


def canvases_of(kind: type[Canvases], length: int, max_model_len: int = 64) -> Canvases:
    return kind(SLOTS, length, max_model_len, MASK, torch.device("cpu"))


@dataclass
class Request:
    seed: int
    prompt: list[int]
    max_tokens: int
    ignores_end: bool
    given_out: list[int] = field(default_factory=list)
    steps: int = 0

    def logits(self, start: int, length: int) -> torch.Tensor:
        """Logits (L, V) of the positions from `start` on."""
        rows = []
        for position in range(start, start + length):
            generator = torch.Generator().manual_seed(1000 * self.seed + position)
            row = torch.randn(VOCABULARY, generator=generator)
            row[EOT] += random.Random(self.seed).choice([-9.0, 1.0])
            rows.append(row)
        return torch.stack(rows)

    def answer(self, max_model_len: int) -> list[int]:
        """The expected output: the most likely tokens, up to the first that ends the text."""
        begin = len(self.prompt)
        count = min(begin + self.max_tokens, max_model_len) - begin
        logits = self.logits(begin, count)
        logits[:, MASK] = -torch.inf
        tokens = logits.argmax(-1).tolist()
        if EOT in tokens and not self.ignores_end:
            tokens = tokens[: tokens.index(EOT) + 1]
        return tokens

    @property
    def text(self) -> list[int]:
        return self.prompt + self.given_out


def assign(
    canvases: Canvases, slot: int, request: Request, policy: UnmaskPolicy, **more: Any
) -> None:
    canvases.assign(
        slot,
        policy,
        request.text,
        len(request.prompt),
        request.max_tokens,
        ignores_end=request.ignores_end,
        generator=torch.Generator(),
        **more,
    )


def step(canvases: Canvases, slots: list[int], requests: dict[int, Request]) -> list[list[int]]:
    """Do a step as vLLM's sampler does; returns the tokens that each row emits."""
    batch = canvases.take(np.array(slots))
    starts = canvases.start[slots].tolist()
    length = canvases.block_length
    logits = torch.stack(
        [requests[slot].logits(start, length) for slot, start in zip(slots, starts, strict=True)]
    )
    was_full = ~batch.block.masked.any(-1)
    outcome = denoising_step(batch.block, logits, end_of_text=END)
    is_full = ~batch.block.masked.any(-1)
    ready = canvases.ready(batch, was_full, is_full, outcome.ended)
    tokens, counts = canvases.settled(batch)
    counts = torch.where(ready, counts, 0)
    canvases.count(batch, ~was_full, counts)
    canvases.file(batch, ready, outcome.ended)
    return [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_every_request_emits_its_answer(kind: type[Canvases], seed: int) -> None:
    """This holds beside any other requests, in any order, and with preemptions."""
    rng = random.Random(seed)
    length, longest = rng.randint(1, 7), rng.randint(12, 40)
    if kind is BlockCausalCanvases:
        longest = longest // length * length  # as vLLM's configuration has it
    canvases = canvases_of(kind, length, longest)
    policies = [create_policy("fixed_schedule", tokens_per_step=n) for n in (1, 2)]
    waiting = [
        Request(
            seed,
            [rng.randrange(MASK) for _ in range(rng.randint(1, longest - 2))],
            rng.randint(1, longest),
            ignores_end=rng.random() < 0.3,
        )
        for seed in range(6)
    ]
    running: dict[int, Request] = {}
    while waiting or running:
        for slot in range(SLOTS):
            if slot not in running and waiting:
                running[slot] = waiting.pop()
                assign(canvases, slot, running[slot], rng.choice(policies))
        slots = rng.sample(sorted(running), rng.randint(1, len(running)))
        for slot, tokens in zip(slots, step(canvases, slots, running), strict=True):
            request = running[slot]
            request.given_out += tokens
            request.steps += 1
            expected = request.answer(longest)
            assert request.given_out == expected[: len(request.given_out)]
            assert request.steps < 200
            if request.given_out == expected:
                canvases.release(slot)
                del running[slot]
            elif rng.random() < 0.1:
                canvases.release(slot)
                waiting.append(running.pop(slot))
    assert len(canvases.blocks) == 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 30),
    max_tokens=st.integers(1, 40),
    length=st.integers(1, 9),
    before=st.integers(0, 3),
)
def test_a_request_begins_at_the_place_of_the_layout(
    kind: type[Canvases], prompt: int, max_tokens: int, length: int, before: int
) -> None:
    """At the beginning, and when it continues after some emitted blocks."""
    longest = 45 // length * length
    new_tokens = min(prompt + max_tokens, longest) - prompt
    if new_tokens < 1:
        return
    layout = BlockLayout.of(kind.attention, prompt, new_tokens, length)
    number = min(before, layout.blocks - 1)
    canvases = canvases_of(kind, length, longest)
    text = [1] * layout.canvas_start_of(number)
    request = Request(0, text[:prompt], max_tokens, False, text[prompt:])
    assign(canvases, 1, request, create_policy("fixed_schedule"))
    block = canvases.take(np.array([1])).block
    start = layout.start_of(number)
    assert int(canvases.start[1]) == start
    assert int(canvases.known[1]) == len(text) - start
    assert int(canvases.limit[1]) == prompt + new_tokens
    assert block.block_index.tolist() == [number]
    assert block.canvas_length.tolist() == [layout.canvas_length]
    assert block.present[0].tolist() == layout.present_in(number)
    known = len(text) - start
    assert block.tokens[0].tolist() == [1] * known + [MASK] * (length - known)


def full(canvases: Canvases, slots: list[int], tokens: int = 3) -> SlotBatch:
    batch = canvases.take(np.array(slots))
    batch.block.set_tokens(torch.full_like(batch.block.tokens, tokens))
    return batch


def started(kind: type[Canvases], prompts: list[int], max_tokens: int = 20) -> Canvases:
    canvases = canvases_of(kind, 8)
    for slot, prompt in enumerate(prompts):
        request = Request(slot, [1] * prompt, max_tokens, False)
        assign(canvases, slot, request, create_policy("fixed_schedule"))
    return canvases


NO, YES = torch.tensor([False]), torch.tensor([True])


def test_a_block_causal_block_waits_for_the_pass_over_its_final_tokens() -> None:
    """It does not wait if no later block will read its keys and values."""
    canvases = started(BlockCausalCanvases, [4])
    batch = full(canvases, [0])
    assert not canvases.ready(batch, NO, YES, NO)
    assert canvases.ready(batch, YES, YES, NO)
    assert canvases.ready(batch, NO, YES, YES)
    for _ in range(2):  # the third block, which ends with the answer, at 24
        assert not canvases.ready(batch, NO, YES, NO)
        canvases.file(batch, YES, NO)
        batch = full(canvases, [0])
    assert canvases.start[0] == 16
    assert canvases.ready(batch, NO, YES, NO)
    assert not canvases.ready(batch, NO, NO, NO)


def test_a_bidirectional_block_is_emitted_when_it_is_full() -> None:
    canvases = started(BidirectionalCanvases, [4])
    batch = full(canvases, [0])
    assert canvases.ready(batch, NO, YES, NO)
    assert not canvases.ready(batch, NO, NO, NO)


def test_positions_that_are_computed_again() -> None:
    lengths, queries = np.array([3, 8, 21]), np.array([3, 8, 21])
    causal, both = canvases_of(BlockCausalCanvases, 8), canvases_of(BidirectionalCanvases, 8)
    assert causal.taken_back_after_prompt(lengths, queries).tolist() == [3, 0, 5]
    assert both.taken_back_after_prompt(lengths, queries).tolist() == [3, 8, 21]


def test_a_block_causal_pass_is_kept_when_its_block_is_emitted() -> None:
    canvases = started(BlockCausalCanvases, [8, 8])
    batch, queries = canvases.take(np.array([1, 0])), torch.tensor([8, 8])
    ready = torch.tensor([True, False])
    assert canvases.taken_back(batch, ready, torch.tensor([8, 8]), queries).tolist() == [0, 8]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("ready", [False, True])
def test_the_next_pass_of_a_bidirectional_request_begins_at_its_block(
    shift: int, ready: bool
) -> None:
    """If it has a cache, and its block is not finished; else at 0. That holds after a full pass
    (from 0) and after a partial one. The prompts have 4, 9 and 9 tokens."""
    canvases = BidirectionalCanvases(SLOTS, 8, 64, MASK, torch.device("cpu"), logit_shift=shift)
    for slot, (prompt, cached) in enumerate([(4, True), (9, True), (9, False)]):
        request = Request(slot, [1] * prompt, 20, False)
        assign(canvases, slot, request, create_policy("fixed_schedule"), cached=cached)
    batch = canvases.take(np.array([2, 0, 1]))
    begins = [0, 0, 0] if ready else [0, 4 - shift, 9 - shift]
    for first, queries in (([0, 0, 0], [29, 24, 29]), ([0, 4 - shift, 9 - shift], [29, 8, 8])):
        ends = torch.tensor(first) + torch.tensor(queries)
        back = canvases.taken_back(
            batch, torch.full((3,), ready), torch.tensor(first), torch.tensor(queries)
        )
        assert (ends - back).tolist() == begins


def test_the_answer_is_cut_at_the_limit_of_the_request() -> None:
    """A block-causal canvas has whole blocks: here 4 tokens of the prompt, 2 of the answer, and 2
    after its limit."""
    canvases = started(BlockCausalCanvases, [4], max_tokens=2)
    tokens, counts = canvases.settled(full(canvases, [0]))
    assert tokens.shape == (1, 8)
    assert counts.tolist() == [2]


def test_nothing_after_the_end_of_a_text_is_seen() -> None:
    canvases = started(BidirectionalCanvases, [4, 4])
    assert isinstance(canvases, BidirectionalCanvases)
    assert canvases.visible[:2].tolist() == [24, 24]
    batch = canvases.take(np.array([1, 0]))
    present = torch.arange(8) < torch.tensor([[3], [8]])
    batch.block.set_tokens(torch.full_like(batch.block.tokens, 5), present)
    canvases.file(batch, torch.tensor([True, True]), torch.tensor([True, False]))
    assert canvases.visible[:2].tolist() == [24, 7]
    assert canvases.seen(batch).tolist() == [7, 24]
    assert canvases.text[1, :12].tolist() == [1] * 4 + [5] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_is_shown_at_the_positions_of_its_tokens(kind: type[Canvases]) -> None:
    canvases = canvases_of(kind, 8)
    answer = list(range(20))
    knowing, plain = create_policy("oracle", reference=answer), create_policy("fixed_schedule")
    for slot, policy in ((0, knowing), (2, plain)):
        assign(canvases, slot, Request(slot, [1] * 5, 20, False), policy)
    seen: list[int] = []
    for _ in range(4):
        batch = full(canvases, [2, 0])
        assert batch.block.reference is not None
        seen += batch.block.reference[1].tolist()
        canvases.file(batch, torch.tensor([True, True]), torch.tensor([False, False]))
    before = 5 if kind is BlockCausalCanvases else 0
    assert seen[: before + 20] == [0] * before + answer
    canvases.release(0)
    assign(canvases, 0, Request(0, [1] * 5, 20, False), create_policy("oracle", reference=[7]))
    shown = canvases.take(np.array([0])).block.reference
    assert shown is not None  # nothing of the previous request is left
    assert shown[0].tolist() == [0] * before + [7] + [0] * (7 - before)


def test_logged_statistics_are_counted_by_slot() -> None:
    canvases = started(BlockCausalCanvases, [4, 4])
    batch = full(canvases, [1, 0])
    canvases.count(batch, torch.tensor([True, False]), torch.tensor([0, 6]))
    canvases.count(batch, torch.tensor([True, True]), torch.tensor([8, 0]))
    assert canvases.nfe[:2].tolist() == [1, 2]
    assert canvases.given_out[:2].tolist() == [6, 8]


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_request_that_ignores_the_end_edits_an_end_of_text(kind: type[Canvases]) -> None:
    """Two slots side by side with the same predictions: first the end of text at position 1, then
    another token everywhere. Position 0 is still masked in between, so neither block has ended."""
    canvases = canvases_of(kind, 8)
    policy = create_policy("llada2_edit", threshold=0.9, edit_threshold=0.5)
    for slot, ignores_end in enumerate((True, False)):
        assign(canvases, slot, Request(slot, [1] * 8, 8, ignores_end), policy)
    sure = torch.zeros(2, 8, VOCABULARY)
    sure[:, 1, EOT] = 20.0
    for logits in (sure, sure.roll(3 - EOT, dims=-1)):
        batch = canvases.take(np.array([0, 1]))
        outcome = denoising_step(batch.block, logits, end_of_text=END)
        canvases.file(batch, torch.tensor([False, False]), outcome.ended)
    assert batch.block.tokens[:, 1].tolist() == [3, EOT]
    assert batch.block.present[:, 2].tolist() == [True, False]
