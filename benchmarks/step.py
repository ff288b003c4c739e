"""The denoising step against `softmax` + `gather`, on the same logits in the same run.

    python benchmarks/step.py                        # 8 blocks of 32, vocabulary 157184, bf16
    python benchmarks/step.py --vocabulary 126464 --rows 16 --dtype float32 --json FILE

Prints the time and the peak memory of the step, as ratios: to `softmax` + `argmax` + `gather`, to
`softmax` alone, to one plain read of the logits (`amax`), and to the logits' own size.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l2pd_plugins import create_policy
from l2pd_plugins.denoising import BlockBatch, denoising_step
from l2pd_plugins.end_of_text import EndOfText


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations allocate and that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._known.add(leaf.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def seconds(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and spread (max - min) of the wall clock of `run`."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), max(times) - min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="blocks in the batch")
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=157184)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--policy", default="confidence_threshold")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    shape = (arguments.rows, arguments.block_length, arguments.vocabulary)
    logits = (torch.randn(shape) * 3).to(getattr(torch, arguments.dtype))
    mask = arguments.vocabulary - 1
    policy = create_policy(arguments.policy)
    end_of_text = EndOfText("block", (arguments.vocabulary - 2,))

    def step() -> None:
        tokens = torch.full(shape[:2], mask)
        batch = BlockBatch.start(tokens, [policy] * len(tokens), mask_token_id=mask)
        denoising_step(batch, logits, end_of_text=end_of_text)

    def softmax_gather() -> torch.Tensor:
        x0 = logits.argmax(-1, keepdim=True)
        return logits.softmax(-1).gather(-1, x0)

    with PeakMemory() as memory:
        step()
    size = logits.numel() * logits.element_size()
    timed = {
        "step": seconds(step, arguments.repeats),
        "softmax + argmax + gather": seconds(softmax_gather, arguments.repeats),
        "softmax alone": seconds(lambda: logits.softmax(-1), arguments.repeats),
        "amax (one plain read)": seconds(lambda: logits.amax(-1), arguments.repeats),
    }
    print(
        f"step: policy={policy.describe()} logits={list(shape)} {arguments.dtype} "
        f"torch={torch.__version__} threads={torch.get_num_threads()} "
        f"machine={platform.processor() or platform.machine()}"
    )
    for name, (median, spread) in timed.items():
        ratio = timed["step"][0] / median
        times = f"{median * 1e3:8.2f} ms (spread {spread * 1e3:6.2f})"
        print(f"  {name:28} {times}, step / this {ratio:5.2f}")
    share = f"{memory.peak / size:.2%} of the logits"
    print(f"  {'peak memory of the step':28} {memory.peak / 1e6:8.2f} MB, {share}")
    if arguments.json:
        result = {
            "arguments": {k: str(v) for k, v in vars(arguments).items()},
            "seconds": {name: {"median": m, "spread": s} for name, (m, s) in timed.items()},
            "peak_bytes": memory.peak,
            "logits_bytes": size,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
