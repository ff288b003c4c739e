"""Shows a test what SGLang's scheduler process knows: how many requests the adapter remembers, and
its live memory.

The file that L2PD_RIG_PROBE names is written anew several times a second, and beside it one that
ends in .heap.
"""

import os
import threading
import time
from pathlib import Path

from l2pd_engine_policies.heap import live_mib

PROBE = "L2PD_RIG_PROBE"


def register():
    """Called by SGLang's plugin loader in each of its processes."""
    if os.environ.get(PROBE):
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(
            "sglang.srt.managers.scheduler.Scheduler.init_diffusion_llm", _watch, HookType.AFTER
        )


def _watch(result, *args, **kwargs):
    threading.Thread(target=_report, args=(Path(os.environ[PROBE]),), daemon=True).start()


def _report(path):
    from l2pd_adapters.sglang.algorithm import UnmaskPolicyAlgorithm

    while True:
        temporary = path.with_suffix(".new")
        temporary.write_text(str(len(UnmaskPolicyAlgorithm.requests)))
        temporary.replace(path)
        path.with_suffix(".heap").write_text(str(live_mib()))
        time.sleep(0.2)
