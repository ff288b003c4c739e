"""A decode step by step, in positions of the canvas: for those who watch, and never for the loop.

A `Recorder` keeps what each step saw and did, and costs the decode nothing: it reads from the
device afterwards. A `FrameReader` reads at once, for those who watch live. A `Canvas` is how the
positions stand after some frames.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from l2pd_plugins.denoising import StepOutcome


@dataclass(frozen=True)
class Prediction:
    """What the model predicted at a position."""

    token: int
    confidence: float
    """Probability of the token."""


@dataclass(frozen=True)
class Frame:
    """What one denoising step of one sequence saw and did.

    Positions are those of the canvas, from 0 behind the prompt.
    """

    block: range
    """The positions of the block, of those that are left."""
    predictions: Mapping[int, Prediction]
    """Of every position that was masked, and of those that were overwritten."""
    committed: tuple[int, ...]
    """Positions that took their prediction, in ascending order."""
    remasked: tuple[int, ...]
    """Positions that were masked again."""
    end: int | None
    """One past the last position of the text, once it is known; what lies behind has left."""


class FrameReader:
    """Reads frames out of the steps of one call of generate, in the order of the steps.

    Args:
        size: positions of each canvas. A block-causal model decodes its last block to its border;
            what lies behind the canvas is left out.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._origins: dict[int, int] = {}
        """Canvas position, 0 or below, at which each sequence's first block begins."""

    def read(
        self, sequences: Sequence[int], blocks: Sequence[int], outcome: StepOutcome
    ) -> list[tuple[int, Frame]]:
        """The frame of each sequence of a step, by one read from the device.

        The arguments are those of an observer of steps: R sequences (indices into the batch), the
        block that each stands in, and what the step did to the (R, L) positions.
        """
        step = outcome.step
        parts = (
            step.x0,  # float32 holds token ids below 2**24 exactly
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
            # Absent positions in front of a canvas belong to the end of the prompt.
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
        """Take a step's tensors, which nothing changes later, and leave the logits."""
        small = replace(outcome, step=outcome.step.changed(logits=None))
        self._steps.append((sequences, blocks, small))

    def frames(self) -> dict[int, list[Frame]]:
        """The frames of each sequence, in order; one per forward pass that it took part in."""
        reader = FrameReader(self._size)
        found: dict[int, list[Frame]] = {}
        for step in self._steps:
            for sequence, frame in reader.read(*step):
                found.setdefault(sequence, []).append(frame)
        return found


@dataclass
class Canvas:
    """How the positions behind a prompt stand after some frames."""

    size: int
    """Positions that are left; those behind the end of the text are not."""
    tokens: dict[int, int] = field(default_factory=dict)
    """Position -> token, of those that are not masked."""
    committed_at: dict[int, int] = field(default_factory=dict)
    """Position -> forward pass, from 0, in which it got its token."""
    nfe: int = 0
    """Forward passes."""

    def length(self, ends: Collection[int]) -> int:
        """Tokens that are there, up to and including the first that is one of `ends`."""
        stop = min((at for at, token in self.tokens.items() if token in ends), default=self.size)
        return sum(at <= stop for at in self.tokens)

    def take(self, frame: Frame) -> None:
        """Go one forward pass further."""
        for at in frame.committed:
            self.tokens[at] = frame.predictions[at].token
            self.committed_at[at] = self.nfe
        if frame.end is not None:
            self.size = frame.end
        for at in (*frame.remasked, *range(self.size, frame.block.stop)):
            self.tokens.pop(at, None)
            self.committed_at.pop(at, None)
        self.nfe += 1
