"""A real vLLM server, launched as docs/serving_vllm.md says."""

import re
import sys
from pathlib import Path

import httpx

from tests.engines.launching import ROOT, LaunchedServer, command_in

DOCS = ROOT / "docs" / "serving_vllm.md"


class Server(LaunchedServer):
    """`remembered` has the number of requests and of their policies."""

    @staticmethod
    def documented_command(model=None, **flags):
        variables, words = command_in(DOCS, "VLLM_CPU_KVCACHE_SPACE", **flags)
        assert words[:2] == [".venv-vllm/bin/vllm", "serve"]
        words[0] = str(Path(sys.executable).parent / "vllm")
        if model is not None:
            words[2] = str(model)
        return variables, words

    def metric(self, name):
        """The value of a counter of the Prometheus endpoint, over all engines."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return sum(float(n) for n in re.findall(rf"^{name}{{.*?}} (\S+)$", text, re.MULTILINE))
