"""A decode whose steps the viewer requests, with a small random model."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from l2pd_adapters.huggingface import load
from l2pd_plugins import L2PDError, UnmaskPolicy
from l2pd_plugins.recording import Canvas
from l2pd_tools.evaluation.prompts import parse_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.viewing.stepped_decode import SteppedDecode

PROMPTS = parse_prompts(["Sort: sgrnm", "Add: 1 + 2"], "test")


@pytest.fixture(scope="module")
def sdar():
    return load("tiny-sdar")


@pytest.fixture(scope="module")
def llada():
    return load("tiny-llada")


@pytest.mark.parametrize("name", ["sdar", "llada"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_frames_lead_to_the_answers_of_evaluate(request, name, batch_size):
    loaded = request.getfixturevalue(name)
    settings = {
        "policy": {"name": "confidence_threshold", "threshold": 0.8},
        "max_new_tokens": 20,
        "batch_size": batch_size,
    }
    decode = SteppedDecode(*loaded, PROMPTS, **settings)
    canvases = [Canvas(20) for _ in PROMPTS]
    with closing(decode):
        for index, frame in decode:
            canvases[index].take(frame)
    assert decode.result is not None
    expected = evaluate(*loaded, PROMPTS, **settings)
    for canvas, made, answer in zip(canvases, decode.result.answers, expected.answers, strict=True):
        assert (made.tokens, made.nfe) == (answer.tokens, answer.nfe)
        assert tuple(canvas.tokens[at] for at in range(canvas.size)) == answer.tokens
        steps = tuple(canvas.committed_at[at] for at in range(canvas.size))
        assert steps == answer.committed_at[: answer.length]
        assert canvas.nfe == answer.nfe
    assert decode.result.configuration == expected.configuration
    assert 0 <= decode.waited <= decode.result.seconds


def test_no_step_is_taken_before_it_is_requested_or_after_closing(llada):
    taken = []

    class Counting(UnmaskPolicy):
        def select(self, step, state):
            taken.append(1)
            return step.masked & False

    decode = SteppedDecode(*llada, PROMPTS[:1], policy=Counting(), max_new_tokens=8)
    assert taken == []
    frames = iter(decode)
    for count in (1, 2, 3):
        next(frames)
        assert len(taken) == count
    decode.close()
    assert len(taken) == 3
    assert "l2pd decode" not in [thread.name for thread in threading.enumerate()]


def test_errors_reach_the_watcher(llada):
    decode = SteppedDecode(*llada, PROMPTS, policy="fixed_schedule", max_new_tokens=0)
    with pytest.raises(L2PDError, match="max_new_tokens=0"), closing(decode):
        next(iter(decode))


def test_a_decode_that_never_began_can_be_closed(llada):
    SteppedDecode(*llada, PROMPTS, policy="fixed_schedule", max_new_tokens=8).close()
