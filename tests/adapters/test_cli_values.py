"""Nasty values of the commands' options: each command works, or says what is wrong in one line."""

from __future__ import annotations

import pytest

NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e-50", "1e308", "x", "", "9" * 40, "1.5")
TEXTS = ("", " ", ",", "x", "a/b/c", "\x00", "../..", "-", "=", "é" * 300)

GENERATE = {
    "--temperature": NUMBERS,
    "--seed": NUMBERS,
    "--max-new-tokens": (*NUMBERS, "1000000000", "500000"),
    "--block-length": (*NUMBERS, "1000000000", "500000"),
    "--batch-size": NUMBERS,
    "--end-of-text": TEXTS,
    "--cache": (*TEXTS, "block"),
    "--device": (*TEXTS, "cuda:99", "5"),
    "--policy": (*TEXTS, "fixed_schedule,steps=nan", "fixed_schedule,=1", "fixed_schedule,a=[1"),
    "--adapter": TEXTS,
    "--pace": NUMBERS,
    "--file": TEXTS,
}
OTHERS = (
    (("compare", "--policy", "fixed_schedule", "--limit", "1"), "--batch-size", NUMBERS),
    (("tune", "confidence_threshold", "--limit", "1"), "--lose", ("nan", "inf", "-1", "x")),
    (("tune", "confidence_threshold", "--limit", "1"), "--set", (*TEXTS, "threshold=nan")),
    (("tune", "fixed_schedule", "--limit", "1"), "--plot", ("x.nonsense", "..")),
)


def check(done, option, value):
    """The command ended well, or with an error that a user can read."""
    assert done.returncode in (0, 2), (option, value, done)
    assert "Traceback" not in done.stderr
    if done.returncode == 2 and not done.stderr.startswith("Usage"):  # typer draws a box
        assert done.stderr.strip().count("\n") == 0, (option, value, done.stderr)


@pytest.mark.parametrize("option", GENERATE)
def test_generate(l2pd, small_model, option):
    for value in GENERATE[option]:
        settings = {"--model": small_model, "--max-new-tokens": 2, option: value}
        flat = [f"{name}={given}" for name, given in settings.items()]
        prompt = [] if option == "--file" else ["Add: 1 + 2"]
        done = l2pd("generate", *prompt, *flat, stdin="Add: 1 + 2\n")
        if done.returncode == 0:
            done.stderr = ""
        check(done, option, value)


@pytest.mark.parametrize(("command", "option", "values"), OTHERS)
def test_other_commands(l2pd, small_model, command, option, values):
    for value in values:
        arguments = [*command, f"--model={small_model}", "--max-new-tokens=2", f"{option}={value}"]
        done = l2pd(*arguments)
        if done.returncode == 0:
            done.stderr = ""
        check(done, option, value)
