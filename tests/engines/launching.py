"""A real engine's server, launched with the command that its documentation has for a CPU."""

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
PROBE = "L2PD_RIG_PROBE"
"""Environment variable by which the rigs learn where to write what the adapter remembers."""


def command_in(page, marker, **flags):
    """(environment variables, words) of the one shell block of a page that holds the marker.

    Flags (`max_num_seqs=4`) replace or follow those of the command; True stands for a flag without
    a value, False takes one away.
    """
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if marker in block]
    words = shlex.split(block.replace("\\\n", " "))
    variables = {}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in words:
            at = words.index(flag)
            has_value = at + 1 < len(words) and not words[at + 1].startswith("--")
            del words[at : at + 1 + has_value]
        if value is not False:
            words += [flag] if value is True else [flag, str(value)]
    return variables, words


def run_example(code):
    """What a Python example of the documentation prints; it must not fail."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask_together(client_of, server, requests):
    """Run coroutines made by functions of a client, all at once: their results in order.
    client_of: makes the client from the server's URL, in the loop that it then runs in."""

    async def run():
        client = client_of(server.url)
        return await asyncio.gather(*(request(client) for request in requests))

    return asyncio.run(run())


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class LaunchedServer:
    """Use as a context manager; `url` answers once inside."""

    def __init__(self, folder, **flags):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_path, self.probe = folder / "server.log", folder / "remembered"
        self.variables, self.command = self.documented_command(port=port, **flags)

    @staticmethod
    def documented_command(**flags):
        """(environment variables, words) that launch it with these flags, by this Python."""
        raise NotImplementedError

    def __enter__(self):
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # its subprocesses end with it
            )
        try:
            self._wait()
        except BaseException:  # an interrupt, too, must not leave the server behind
            self.__exit__()
            raise
        return self

    def _wait(self):
        """Until the server answers."""
        deadline = time.monotonic() + 400
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=20).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log[-5000:]}")
            time.sleep(0.5)

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def environment(self):
        """The environment variables of the server's process. Its threads sleep while they wait, as
        those of `make` do, since the tests run on the same cores."""
        passive = {"OMP_WAIT_POLICY": "PASSIVE"}
        return {**passive, **os.environ, **self.variables, PROBE: str(self.probe)}

    @property
    def log(self):
        return self.log_path.read_text(errors="replace")

    @property
    def remembered(self):
        """What the engine's rig says that the adapter remembers."""
        return json.loads(self.probe.read_text())

    @property
    def live_mib(self):
        """MiB that the process with the model has allocated and not freed (rig)."""
        return float(self.probe.with_suffix(".heap").read_text() or "nan")
