"""`l2pd chat`, in a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.run import evaluate
from tests.tools.cli.recorded import ONE_THREAD, START

MESSAGES = ["Add: 346 + 855", "Sort: sgrnm", "Walk 9 steps in 2-7 from 3"]
SYSTEM = {"role": "system", "content": "Be short."}


def chat(l2pd, small_model, lines, *options):
    settings = ("--model", small_model, "--max-new-tokens", "16")
    return l2pd("chat", *settings, *options, stdin="\n".join(lines) + "\n")


def answered(
    loaded, messages, *, before=(), policy="fixed_schedule", seed=None, first=0
) -> list[str]:
    """The answers to messages of one conversation, each decoded by itself."""
    turns: list[dict[str, str]] = list(before)
    answers = []
    for i, message in enumerate(messages):
        drawn: dict[str, Any] = {} if seed is None else {"temperature": 1.5, "seed": seed + i}
        prompt = Prompt(message, "x", before=tuple(turns))
        result = evaluate(*loaded, [prompt], policy=policy, max_new_tokens=16, **drawn)
        answers.append(result.answers[0].text)
        turns.append({"role": "user", "content": message})
        turns.append({"role": "assistant", "content": answers[-1]})
    return answers[first:]


def test_each_answer_sees_the_turns_before_it(l2pd, small_model, loaded) -> None:
    ended = chat(l2pd, small_model, MESSAGES)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == answered(loaded, MESSAGES)
    alone = [answer for message in MESSAGES for answer in answered(loaded, [message])]
    assert ended.stdout.splitlines()[1:] != alone[1:]
    first, second, *figures = ended.stderr.splitlines()
    assert first == f"loading {small_model}"
    assert "policy=fixed_schedule(tokens_per_step=1)" in second
    assert len(figures) == 3 and all(line.startswith("NFE=") for line in figures)


def test_a_reset_forgets_the_turns_and_keeps_the_system_prompt(l2pd, small_model, loaded) -> None:
    lines = [MESSAGES[0], "/reset", MESSAGES[1]]
    ended = chat(l2pd, small_model, lines, "--system", SYSTEM["content"])
    one, two = (answered(loaded, [message], before=[SYSTEM]) for message in MESSAGES[:2])
    assert ended.stdout.splitlines() == one + two


def test_a_policy_is_switched_and_the_turns_stay(l2pd, small_model, loaded) -> None:
    policy = "confidence_threshold,threshold=0.3"
    ended = chat(l2pd, small_model, [f"/policy {policy}", *MESSAGES[:2], "/policy"])
    expected = answered(
        loaded, MESSAGES[:2], policy={"name": "confidence_threshold", "threshold": 0.3}
    )
    assert ended.stdout.splitlines() == expected
    assert ended.stderr.count("policy=confidence_threshold(threshold=0.3)") == 2


def test_turns_draw_with_seeds_of_their_own(l2pd, small_model, loaded) -> None:
    ended = chat(l2pd, small_model, MESSAGES[:2], "--temperature", "1.5", "--seed", "7")
    assert ended.stdout.splitlines() == answered(loaded, MESSAGES[:2], seed=7)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/polcy cora", "/polcy: there is no such command; did you mean /policy?"),
        ("/x", "/x: there is no such command; expected /policy, /reset, /help, /exit"),
        ("/policy learn3pd", "/policy learn3pd: no policy 'learn3pd' (did you mean 'learn2pd'?)"),
        ("/policy cora,x=1", "/policy cora,x=1: policy 'cora' has no option 'x'"),
        ("/policy cora,x", "/policy cora,x: 'x' is not of the form key=value"),
        ("/policy transformer_sampler", "no filter belongs to the model"),
        ("/reset now", "/reset now: /reset takes no value"),
        ("\udcff", "the message is not UTF-8: the byte 0xff"),
        ("Say <|mask|>", "mask"),
    ],
)
def test_an_error_is_a_line_and_the_chat_goes_on(
    l2pd, small_model, loaded, line: str, message: str
) -> None:
    if "mask" in line:
        line = f"Say {loaded[1].mask_token or loaded[1].decode([loaded[0].config.mask_token_id])}"
    ended = chat(l2pd, small_model, [MESSAGES[0], line, MESSAGES[1], "/exit", MESSAGES[2]])
    assert ended.returncode == 0, ended.stderr
    (error,) = [each for each in ended.stderr.splitlines() if each.startswith("error: ")]
    assert message in error
    assert ended.stdout.splitlines() == answered(loaded, MESSAGES[:2])


def test_a_slash_is_written_twice(l2pd, small_model, loaded) -> None:
    ended = chat(l2pd, small_model, ["//policy", "/help"], "--quiet")
    assert ended.stdout.splitlines() == answered(loaded, ["/policy"])
    assert [line.split()[0] for line in ended.stderr.splitlines()] == [
        *("/policy", "/reset", "/help", "/exit")
    ]


@contextmanager
def terminal(*arguments: str, folder: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The chat on a terminal of its own."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", START, "chat", *arguments]
    variables = {**ONE_THREAD, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    running = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=variables,
        start_new_session=True, preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield ours, running
    finally:
        running.kill()
        running.wait()
        os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def until(ours: int, text: str, seconds: float = 120) -> str:
    """What the terminal shows until this text."""
    shown, end = "", time.monotonic() + seconds
    while text not in shown:
        ready, _, _ = select.select([ours], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{text!r} is not shown: {shown}"
        try:
            shown += os.read(ours, 65536).decode(errors="replace")
        except OSError:  # it has ended
            assert text in shown, shown
    return shown


def test_control_c_ends_the_answer_and_control_d_the_chat(tmp_path: Path) -> None:
    options = ("--watch", "--pace", "0.5")
    with terminal(*options, folder=tmp_path) as (ours, running):
        until(ours, "> ")
        os.write(ours, b"Sort: kjeqz\r")
        until(ours, "just now")
        os.write(ours, b"\x03")
        until(ours, "stopped; the message is not kept")
        os.write(ours, b"/policy confidence_threshold\r")
        until(ours, "policy=confidence_threshold(threshold=0.9)")
        os.write(ours, b"Sort: kjeqz\r")
        assert "ejkqz" in until(ours, " seconds=")
        os.write(ours, b"\x04")
        assert running.wait(timeout=60) == 0
