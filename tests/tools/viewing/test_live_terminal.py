"""`l2pd generate --watch`, in a real terminal of 80 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from l2pd_plugins.recording import Canvas, Frame, Prediction
from l2pd_tools.viewing.live_terminal import MASKED, _View
from l2pd_tools.viewing.token_text import TokenTexts

PROMPTS = ["Add: 346 + 855", "Sort: sgrnm"]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(*arguments: str, columns: int = 80, lines: int = 24) -> tuple[str, str]:
    """Run the command with stderr on a terminal; returns (stdout, the output to the terminal)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "l2pd_tools.cli", "generate", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    sent = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux raises this if the other side has closed
            break
        if not part:
            break
        sent += part
    os.close(ours)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0, sent.decode()
    return out.decode(), sent.decode()


def test_every_step_is_drawn_and_the_last_one_stays(l2pd, small_model: Path, tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    settings = ["--model", str(small_model), "--file", str(file), "--max-new-tokens", "16"]
    out, sent = on_terminal(*settings, "--watch", "--pace", "0")
    quiet = l2pd("generate", *settings, "--batch-size", 1)
    assert out == quiet.stdout
    plain = ESCAPE.sub("", sent)
    assert all(prompt in plain for prompt in PROMPTS)
    assert MASKED in plain
    # The last drawing of each prompt stays, with the figures that the command prints at its end.
    nfes = [int(found) for found in re.findall(r"NFE (\d+) ", plain)]
    first = nfes.index(1, 1)  # the second prompt begins here
    mean = sum(max(part) for part in (nfes[:first], nfes[first:])) / 2
    assert f"NFE={mean:.4g} " in quiet.stderr
    assert f"NFE={mean:.4g} " in plain
    lines = re.split(r"[\r\n]+", plain)
    assert all(cell_len(line) <= 80 for line in lines if "model=" not in line)
    assert "\x1b[?25h" in sent  # the cursor is shown again


def test_without_a_terminal_it_is_refused(l2pd, small_model: Path):
    ended = l2pd("generate", PROMPTS[0], "--model", small_model, "--watch")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "--watch draws on a terminal" in ended.stderr
    assert "--trace" in ended.stderr


def test_pace_without_watch_is_refused(l2pd, small_model: Path):
    ended = l2pd("generate", PROMPTS[0], "--model", small_model, "--pace", "1")
    assert ended.returncode == 2
    assert "--pace 1.0 requires --watch" in ended.stderr


def view(tokenizer, tokens: dict[int, int], size: int, prompt: str = "p") -> _View:
    made = _View(0, prompt, Canvas(size), TokenTexts(tokenizer), [])
    predictions = {at: Prediction(token, 0.5) for at, token in tokens.items()}
    made.take(Frame(range(size), predictions, tuple(tokens), (), None))
    return made


def shown(made: _View, width: int, height: int | None = None) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(made.drawn(width, height))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_it_wraps_and_special_tokens_are_written_out(loaded):
    tokenizer = loaded[1]
    letters = tokenizer("ab\nc", add_special_tokens=False).input_ids
    tokens = {0: letters[0], 1: letters[2], 2: tokenizer.eos_token_id, 4: letters[3]}
    lines = shown(view(tokenizer, tokens, 6), width=20)
    assert lines[:4] == ["p", "", "a\\n<|endoftext|>░c░", ""]
    narrow = shown(view(tokenizer, tokens, 6), width=8)
    assert narrow[2:5] == ["a\\n", "<|endoft", "ext|>░c░"]


def test_a_long_canvas_shows_the_part_around_the_current_block(loaded):
    made = view(loaded[1], {}, 1000)
    made.take(Frame(range(900, 904), {}, (), (), None))
    lines = shown(made, width=40, height=16)
    assert len(lines) <= 16
    assert "positions 900-903" in " ".join(lines)
    assert len([line for line in shown(made, width=40) if line == MASKED * 40]) == 25


class Dropping:
    """A tokenizer that drops the space before the first token and has a part of a character."""

    words = ("a", " b", "\ufffd")

    def __call__(self, text, add_special_tokens):
        return type("Encoded", (), {"input_ids": [0]})

    def decode(self, tokens, clean_up_tokenization_spaces):
        return "".join(self.words[token] for token in tokens).removeprefix(" ")

    def convert_ids_to_tokens(self, token):
        return f"<0x{token:02X}>"


@pytest.mark.parametrize(("token", "text"), [(0, "a"), (1, " b"), (2, "<0x02>")])
def test_texts_of_single_tokens(token, text):
    assert TokenTexts(Dropping())[token] == text
