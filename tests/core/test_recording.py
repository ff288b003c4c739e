"""Frames of a decode, compared with its steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins import create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.recording import Canvas, FrameReader, Recorder

LENGTH, MASK, EOT, VOCABULARY = 4, 11, 10, 12


def decoded(seed, rows, in_prompt, rule, watch):
    """Decode one block of each row and pass every step to `watch`; returns the final block."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.arange(LENGTH) >= torch.tensor(in_prompt).unsqueeze(-1)
    batch = BlockBatch.start(
        torch.full((rows, LENGTH), MASK),
        [create_policy("confidence_threshold", threshold=0.3)] * rows,
        mask_token_id=MASK,
        present=present,
    )
    outcomes = []
    while bool(batch.masked.any()):
        logits = torch.randn(rows, LENGTH, VOCABULARY, generator=generator) * 2
        outcome = denoising_step(batch, logits, end_of_text=EndOfText(rule, (EOT,)))
        outcomes.append(outcome)
        watch(list(range(rows)), [0] * rows, outcome)
    return batch, outcomes


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=3),
    st.sampled_from(["block", "predicted", "off"]),
)
def test_applying_all_frames_gives_the_final_block(seed, in_prompt, rule):
    rows = len(in_prompt)
    recorder = Recorder(LENGTH)
    batch, outcomes = decoded(seed, rows, in_prompt, rule, recorder)
    frames = recorder.frames()
    for row, skipped in enumerate(in_prompt):
        canvas = Canvas(LENGTH - skipped)
        for frame in frames[row]:
            canvas.take(frame)
        assert canvas.nfe == len(outcomes)
        left = [i for i in range(LENGTH) if batch.present[row, i]]
        assert canvas.size == left[-1] + 1 - skipped
        assert canvas.tokens == {i - skipped: int(batch.tokens[row, i]) for i in left}
        for i in left:
            steps = [s for s, o in enumerate(outcomes) if bool(o.committed[row, i])]
            assert canvas.committed_at[i - skipped] == steps[-1]


@given(st.integers(0, 2**31))
def test_frames_contain_what_each_step_saw(seed):
    read = []
    reader = FrameReader(LENGTH)
    _, outcomes = decoded(seed, 2, [0, 1], "block", lambda *step: read.append(reader.read(*step)))
    for found, outcome in zip(read, outcomes, strict=True):
        assert [sequence for sequence, _ in found] == [0, 1]
        for (row, frame), skipped in zip(found, (0, 1), strict=True):
            masked = outcome.step.masked[row].nonzero().flatten().tolist()
            assert list(frame.predictions) == [i - skipped for i in masked]
            for i in masked:
                prediction = frame.predictions[i - skipped]
                assert prediction.token == outcome.step.x0[row, i]
                assert prediction.confidence == outcome.step.confidence[row, i]


def test_a_recorder_and_a_reader_agree_and_logits_are_not_kept():
    recorder, reader, read = Recorder(3), FrameReader(3), {0: [], 1: []}

    def watch(*step):
        recorder(*step)
        for sequence, frame in reader.read(*step):
            read[sequence].append(frame)

    decoded(3, 2, [0, 0], "off", watch)
    assert recorder.frames() == read
    # The canvas has three positions, the block four.
    assert all(
        max(frame.predictions, default=0) < 3 for frames in read.values() for frame in frames
    )
    assert all(not step.step.has("logits") for _, _, step in recorder._steps)


@pytest.mark.parametrize(("token", "length"), [(EOT, 2), (5, 3)])
def test_the_length_of_a_canvas_ends_with_the_first_end_of_text(token, length):
    canvas = Canvas(5, tokens={0: 1, 1: token, 3: 2})
    assert canvas.length([EOT]) == length
