"""A real SGLang server, launched as docs/serving_sglang.md says."""

import sys

from tests.engines.launching import ROOT, LaunchedServer, command_in

DOCS = ROOT / "docs" / "serving_sglang.md"


class Server(LaunchedServer):
    """`remembered` is how many requests there are."""

    @staticmethod
    def documented_command(**flags):
        variables, words = command_in(DOCS, "--device cpu", **flags)
        assert words[:3] == [".venv-sglang/bin/python", "-m", "sglang.launch_server"]
        words[0] = sys.executable
        return variables, words
