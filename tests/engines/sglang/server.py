"""A real SGLang server, launched as docs/serving_sglang.md says."""

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

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "serving_sglang.md"


def documented_command(port, *, model=None, **flags):
    """The command for the CPU, with this Python and port; flags (`dllm_algorithm="..."`) replace or
    follow its own, and True stands for a flag without a value."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "--device cpu" in block]
    words = shlex.split(block.replace("\\\n", " "))
    while "=" in words[0]:
        words.pop(0)
    words[0] = sys.executable
    wanted = {"port": port, "model_path": model, **flags}
    for name, value in wanted.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in words and value is not None:
            words[words.index(flag) + 1] = str(value)
        elif value is not None:
            words += [flag] if value is True else [flag, str(value)]
    return words


def environment(**more):
    """What the documented command sets, and more."""
    return {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", **more}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """Use as a context manager; `url` answers once inside."""

    def __init__(self, folder, model=None, **flags):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = folder / "server.log"
        self.probe = folder / "remembered"
        self.command = documented_command(self.port, model=model, **flags)

    def __enter__(self):
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(L2PD_RIG_PROBE=str(self.probe)),
                start_new_session=True,  # its subprocesses end with it
            )
        deadline = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=20).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"the server did not start:\n{self.log[-5000:]}")
            time.sleep(0.5)

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def log(self):
        return self.log_path.read_text(errors="replace")

    @property
    def remembered(self):
        """How many requests the adapter remembers."""
        return int(self.probe.read_text())
