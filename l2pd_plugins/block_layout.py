"""The positions of the blocks of a canvas, for every engine's adapter and for recording decodes.

A canvas is the part of a sequence that is generated, after its prompt. It is decoded in blocks of L
positions, from left to right (LLaDA, arXiv 2502.09992; block diffusion, arXiv 2503.09573).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:  # the command line reads families of models, and starts in a fraction of a second
    import numpy as np

Lengths = TypeVar("Lengths", int, "np.ndarray")
"""One length, or an array of them."""

Attention = Literal["bidirectional", "block_causal"]
"""Which positions a position sees. "bidirectional": the whole prompt and canvas. "block_causal":
its own block and the blocks before it; blocks are counted from the prompt's first token."""


def whole_blocks(positions: int, block_length: int) -> int:
    """The number of positions, rounded up to whole blocks."""
    return -(-positions // block_length) * block_length


def begun_by_prompt(prompt_length: Lengths, block_length: int) -> Lengths:
    """The number of the prompt's positions in its last block, if blocks are counted from the
    prompt's first token; 0 if the prompt ends with a block.
    """
    return prompt_length % block_length


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of one canvas. Positions are counted from the start of the sequence, or from
    another origin of the caller's (columns of a left-padded batch), the same for all fields."""

    begin: int
    """First position of the canvas, which is one past the prompt's last."""
    end: int
    """One past the last position of the canvas."""
    origin: int
    """First position of block 0. It is before `begin` if the block begins with prompt tokens."""
    block_length: int

    @classmethod
    def of(
        cls,
        attention: Attention,
        begin: int,
        new_tokens: int,
        block_length: int,
        *,
        prompt_length: int | None = None,
    ) -> BlockLayout:
        """The layout of a canvas that begins at `begin` and has room for `new_tokens` tokens.

        Bidirectional models: block 0 begins with the canvas, and the last block may extend beyond
        the canvas's end. Block-causal models: blocks are counted from the prompt's first token.
        Block 0 is then the last block of the prompt (or the next one, if the prompt ends with a
        block), and the canvas ends with its last block, since such a model sees only whole blocks.

        Args:
            prompt_length: number of tokens of the prompt; by default `begin`. Needed if `begin`
                also counts padding.
        """
        if attention == "bidirectional":
            return cls(begin, begin + new_tokens, begin, block_length)
        in_prompt = begun_by_prompt(begin if prompt_length is None else prompt_length, block_length)
        origin = begin - in_prompt
        end = origin + whole_blocks(in_prompt + new_tokens, block_length)
        return cls(begin, end, origin, block_length)

    @property
    def canvas_length(self) -> int:
        """Positions from block 0's first to the canvas's last."""
        return self.end - self.origin

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return whole_blocks(self.canvas_length, self.block_length) // self.block_length

    @property
    def whole_end(self) -> int:
        """One past the last position of the last block, which may be after the canvas."""
        return self.start_of(self.blocks)

    def start_of(self, block: int) -> int:
        """First position of the block."""
        return self.origin + block * self.block_length

    def canvas_start_of(self, block: int) -> int:
        """First position of the block that belongs to the canvas."""
        return max(self.begin, self.start_of(block))

    def block_at(self, position: int) -> int:
        """The block that contains this position, which must not be before `origin`."""
        return (position - self.origin) // self.block_length

    def present_in(self, block: int) -> list[bool]:
        """Which of the block's L positions belong to the canvas."""
        start = self.start_of(block)
        return [self.begin <= start + i < self.end for i in range(self.block_length)]
