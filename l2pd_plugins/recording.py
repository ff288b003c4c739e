"""Recording a decode step by step, in positions of the canvas. Only for observers; the loop does
not use it.

A `Recorder` stores the input and the result of each step without slowing the decode: it reads from
the device afterwards. A `FrameReader` reads at once, for live displays. A `Canvas` is the state of
the positions after some frames.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from l2pd_plugins.denoising import StepOutcome


@dataclass(frozen=True)
class Prediction:
    """The model's prediction at a position."""

    token: int
    confidence: float
    """Probability of the token."""


@dataclass(frozen=True)
class Frame:
    """The input and the result of one denoising step, for one sequence.

    Positions are those of the canvas, from 0 directly after the prompt.
    """

    block: range
    """The positions of the block that are still part of the canvas."""
    predictions: Mapping[int, Prediction]
    """Predictions of every position that was masked, and of those that were overwritten."""
    committed: tuple[int, ...]
    """Committed positions, in ascending order."""
    remasked: tuple[int, ...]
    """Positions that were masked again."""
    end: int | None
    """One past the last position of the text, once it is known; later positions are no longer part
    of the canvas.
    """


class FrameReader:
    """Reads frames out of the steps of one call of generate, in the order of the steps.

    Args:
        size: positions of each canvas. A block-causal model decodes its last block completely;
            positions beyond the canvas are left out.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._origins: dict[int, int] = {}
        """Canvas position, 0 or below, at which each sequence's first block begins."""

    def read(
        self, sequences: Sequence[int], blocks: Sequence[int], outcome: StepOutcome
    ) -> list[tuple[int, Frame]]:
        """The frames of one step, one per sequence, with a single read from the device.

        The arguments are those of an observer of steps: R sequences (indices into the batch), the
        current block of each, and what the step did to the (R, L) positions.
        """
        step = outcome.step
        parts = (
            step.x0,  # float32 represents token ids below 2**24 exactly
            step.confidence,
            step.masked,
            step.present,
            outcome.committed,
            outcome.remasked,
            step.present & ~outcome.behind & outcome.ended.unsqueeze(-1),
        )
        packed = torch.stack([part.to(torch.float32) for part in parts], dim=1)
        return [
            (sequence, self._frame(sequence, block, values))
            for sequence, block, values in zip(sequences, blocks, packed.tolist(), strict=True)
        ]

    def _frame(self, sequence: int, block: int, values: list[list[float]]) -> Frame:
        x0, confidence, masked, present, committed, remasked, last = values
        length = len(x0)
        if sequence not in self._origins:
            # Absent positions before a canvas belong to the prompt.
            self._origins[sequence] = -present.index(1.0)
        begin = self._origins[sequence] + block * length

        def where(chosen: Sequence[float]) -> tuple[int, ...]:
            return tuple(begin + i for i in range(length) if chosen[i] and begin + i < self._size)

        left, ending = where(present), where(last)
        return Frame(
            block=range(left[0], left[-1] + 1) if left else range(self._size, self._size),
            predictions={
                at: Prediction(int(x0[at - begin]), confidence[at - begin])
                for at in where([a or b for a, b in zip(masked, committed, strict=True)])
            },
            committed=where(committed),
            remasked=where(remasked),
            end=ending[-1] + 1 if ending else None,
        )


class Recorder:
    """Keeps every step of one call of generate: an `on_step` that waits for no device.

    Args:
        size: positions of each canvas, as for `FrameReader`.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._steps: list[tuple[list[int], list[int], StepOutcome]] = []

    def __call__(self, sequences: list[int], blocks: list[int], outcome: StepOutcome) -> None:
        """Store a step's tensors, which are not changed later, without the logits."""
        small = replace(outcome, step=outcome.step.changed(logits=None))
        self._steps.append((sequences, blocks, small))

    def frames(self) -> dict[int, list[Frame]]:
        """The frames of each sequence, in order: one per forward pass in which it took part."""
        reader = FrameReader(self._size)
        found: dict[int, list[Frame]] = {}
        for step in self._steps:
            for sequence, frame in reader.read(*step):
                found.setdefault(sequence, []).append(frame)
        return found


@dataclass
class Canvas:
    """The state of the canvas after some frames."""

    size: int
    """Number of positions of the canvas, without those after the end of the text."""
    tokens: dict[int, int] = field(default_factory=dict)
    """Position -> token, of those that are not masked."""
    committed_at: dict[int, int] = field(default_factory=dict)
    """Position -> forward pass, from 0, in which it got its token."""
    nfe: int = 0
    """Forward passes."""

    def length(self, ends: Collection[int]) -> int:
        """Number of tokens, up to and including the first that is in `ends`."""
        stop = min((at for at, token in self.tokens.items() if token in ends), default=self.size)
        return sum(at <= stop for at in self.tokens)

    def take(self, frame: Frame) -> None:
        """Apply the frame of one forward pass."""
        for at in frame.committed:
            self.tokens[at] = frame.predictions[at].token
            self.committed_at[at] = self.nfe
        if frame.end is not None:
            self.size = frame.end
        for at in (*frame.remasked, *range(self.size, frame.block.stop)):
            self.tokens.pop(at, None)
            self.committed_at.pop(at, None)
        self.nfe += 1
