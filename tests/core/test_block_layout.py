"""The places of blocks, compared with counting position by position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins.block_layout import BlockLayout, begun_by_prompt, whole_blocks

PROMPTS, TOKENS, LENGTHS = st.integers(0, 70), st.integers(1, 130), st.integers(1, 40)


@given(PROMPTS, TOKENS, LENGTHS)
def test_bidirectional(prompt: int, tokens: int, length: int) -> None:
    layout = BlockLayout.of("bidirectional", prompt, tokens, length)
    canvas = range(prompt, prompt + tokens)
    blocks = [canvas[i : i + length] for i in range(0, tokens, length)]
    assert layout.blocks == len(blocks)
    assert layout.canvas_length == tokens
    for number, block in enumerate(blocks):
        assert layout.start_of(number) == layout.canvas_start_of(number) == block[0]
        assert {layout.block_at(position) for position in block} == {number}
        assert layout.present_in(number) == [i < len(block) for i in range(length)]
    assert layout.whole_end == blocks[-1][0] + length


@given(PROMPTS, TOKENS, LENGTHS, st.integers(0, 50))
def test_block_causal(prompt: int, tokens: int, length: int, padding: int) -> None:
    """Padding on the left shifts all positions and changes nothing else."""
    layout = BlockLayout.of("block_causal", padding + prompt, tokens, length, prompt_length=prompt)
    borders = range(0, prompt + tokens + length, length)
    blocks = [
        [padding + at for at in range(border, border + length)]
        for border in borders
        if border + length > prompt and border < prompt + tokens
    ]
    assert layout.blocks == len(blocks)
    assert layout.origin == blocks[0][0]
    assert layout.end == layout.whole_end == blocks[-1][-1] + 1
    assert layout.canvas_length == sum(map(len, blocks))
    for number, block in enumerate(blocks):
        inside = [position >= padding + prompt for position in block]
        assert layout.present_in(number) == inside
        assert layout.start_of(number) == block[0]
        assert layout.canvas_start_of(number) == block[inside.index(True)]
        assert {layout.block_at(position) for position in block} == {number}


def test_begin_gives_the_length_of_the_prompt() -> None:
    assert BlockLayout.of("block_causal", 37, 64, 32) == BlockLayout(37, 128, 32, 32)


@pytest.mark.parametrize("prompt", [0, 32])
def test_a_prompt_of_whole_blocks_shares_no_block_with_the_answer(prompt: int) -> None:
    assert BlockLayout.of("block_causal", prompt, 32, 32) == BlockLayout(
        prompt, prompt + 32, prompt, 32
    )


@given(st.integers(0, 300), LENGTHS)
def test_whole_blocks_hold_the_positions_and_none_is_empty(positions: int, length: int) -> None:
    blocks = [range(i, i + length) for i in range(0, positions, length)]
    assert whole_blocks(positions, length) == sum(len(block) for block in blocks)


@given(st.lists(PROMPTS, min_size=1), LENGTHS)
def test_positions_after_the_last_whole_block_of_a_prompt(prompts: list[int], length: int) -> None:
    """Counted for one prompt and for an array of prompts."""
    expected = [len(list(range(prompt))[prompt // length * length :]) for prompt in prompts]
    assert [begun_by_prompt(prompt, length) for prompt in prompts] == expected
    assert begun_by_prompt(np.array(prompts), length).tolist() == expected
