"""Shows a test what vLLM's worker knows: how many requests and policies the adapter remembers, and
its live memory.

The file that L2PD_RIG_PROBE names is written anew several times a second, and beside it one that
ends in .heap.
"""

import functools
import json
import os
import threading
import time
from pathlib import Path

from l2pd_engine_policies.heap import live_mib

PROBE = "L2PD_RIG_PROBE"


def register():
    """Called by vLLM's plugin loader in each of its processes."""
    if not os.environ.get(PROBE):
        return
    from l2pd_adapters.vllm.model_state import DiffusionState

    stock = DiffusionState.__init__
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def watched(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        path = Path(os.environ[PROBE])
        threading.Thread(target=_report, args=(self, path), daemon=True).start()

    DiffusionState.__init__ = watched


def _report(state, path):
    while True:
        blocks = state.canvases.blocks
        temporary = path.with_suffix(".new")
        temporary.write_text(
            json.dumps(
                {"requests": max(len(blocks), len(state._slots)), "policies": len(blocks.policies)}
            )
        )
        temporary.replace(path)
        path.with_suffix(".heap").write_text(str(live_mib()))
        time.sleep(0.2)
