"""Running a command in a terminal of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from rich.cells import cell_len

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def run_in_terminal(
    command: Sequence[str], width: int, cwd: Path, environment: Mapping[str, str]
) -> tuple[int, str]:
    """The exit code, and what a terminal of this width shows in the end: stdout and stderr, without
    escape sequences.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    kept = {key: value for key, value in environment.items() if key not in ("COLUMNS", "LINES")}
    kept["TERM"] = "xterm-256color"
    started = subprocess.Popen(
        command, cwd=cwd, env=kept, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # Linux: the last process has closed the terminal
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    text = _ESCAPES.sub("", b"".join(parts).decode(errors="replace")).replace("\r\n", "\n")
    # What a progress bar draws is overwritten after a carriage return.
    lines = (line.rpartition("\r")[2] for line in text.split("\n"))
    return started.wait(), "\n".join(lines)


def table_in(text: str) -> list[str]:
    """The lines of an output up to the configurations, after which there is only text; without the
    line of a progress bar.
    """
    lines = takewhile(lambda line: "model=" not in line, text.split("\n"))
    return [line for line in lines if not line.startswith("decoding:")]


def widest(lines: list[str]) -> int:
    """Terminal cells of the widest line."""
    return max(map(cell_len, lines), default=0)
