"""Plot the cost of a step and of a token against batch, canvas length and vocabulary.

    python benchmarks/scaling.py --out benchmarks/results/DATE-cpu-scaling

Four panels: the step against the rows of logits and against the vocabulary, each with the memory
floor (`amax`); milliseconds per token of tiny-llada's answers against the batch and against the
canvas, with each cache. The dashed line in the third panel is the bound by the forward pass: one
row's share of a pass over that many rows, relative to batch 1. The script writes a PNG and a JSON
and runs on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from loop import Comparison
from matplotlib import pyplot as plt
from measuring import device_of, output, positive, timed, write

from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_plugins import create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.loading import load_model

BLOCK = 32
CACHES = ("none", "prefix", "dual")
COLUMNS = 256
DEVICE = device_of("auto")

Curves = dict[str, dict[int, float]]
"""Line -> place on the x axis -> milliseconds."""


def step_cost(rows: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Milliseconds of one step on bf16 logits, and of reading them."""
    logits = torch.randn(rows // BLOCK, BLOCK, vocabulary, device=DEVICE).bfloat16()
    mask = vocabulary - 1
    tokens = torch.full(logits.shape[:2], mask, device=DEVICE)
    policies = [create_policy("confidence_threshold")] * len(tokens)

    def step() -> None:
        batch = BlockBatch.start(tokens, policies, mask_token_id=mask)
        denoising_step(batch, logits, end_of_text=EndOfText("block", (mask - 1,)))

    times = timed({"step": step, "amax": lambda: logits.amax(-1)}, repeats, device=DEVICE)
    return {name: 1e3 * found.median for name, found in times.items()}


def token_cost(comparison: Comparison, prompts: list[str], batch: int) -> float:
    """Milliseconds per token of the answers."""
    comparison.ours(prompts[:batch], batch)
    start = time.perf_counter()
    found = comparison.ours(prompts, batch)
    return 1e3 * (time.perf_counter() - start) / sum(found.lengths)


def forward_cost(model: Any, batch: int, repeats: int) -> float:
    """Milliseconds per row of a forward pass of the decoder over `COLUMNS` columns."""
    tokens = torch.zeros(batch, COLUMNS, dtype=torch.int64, device=DEVICE)

    def run() -> None:
        with torch.no_grad():
            model.get_decoder()(input_ids=tokens, use_cache=False)

    return 1e3 * timed({"forward": run}, repeats, device=DEVICE)["forward"].median / batch


def curves(places: list[int], cost: Callable[[int], dict[str, float]]) -> Curves:
    """The cost at every place, by line."""
    found: Curves = {}
    for place in places:
        for name, value in cost(place).items():
            found.setdefault(name, {})[place] = value
            print(f"  {place:8} {name:12} {value:9.3f} ms", flush=True)
    return found


def draw(panels: dict[str, Curves], path: Path) -> None:
    """One panel per x axis."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6))
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for name, line in lines.items():
            style = "--" if name == "forward alone" else "o-"
            axis.plot(list(line), list(line.values()), style, label=name, markersize=3)
        axis.set_xlabel(label)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds per step")
    axes[2].set_ylabel("milliseconds per token")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive, nargs="+", default=[32, 64, 128, 256, 512, 1024])
    parser.add_argument(
        "--vocabularies",
        type=positive,
        nargs="+",
        default=[8192, 16384, 32768, 65536, 126464, 157184],
    )
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--lengths", type=positive, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--prompts", type=positive, default=64)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--out", type=output, required=True, help="path without a suffix")
    arguments = parser.parse_args()

    mpl.use("Agg")
    torch.manual_seed(0)
    model, tokenizer = load_model("tiny-llada", str(DEVICE))
    prompts = [prompt.text for prompt in read_prompts(heldout_prompts(), arguments.prompts)]

    def per_token(length: int, batch: int) -> dict[str, float]:
        found = {}
        for cache in CACHES:
            policy = ("confidence_threshold", "block")
            comparison = Comparison(model, tokenizer, *policy, length, cache)
            found[cache] = token_cost(comparison, prompts, batch)
        return found

    panels: dict[str, Curves] = {}

    def keep(label: str, lines: Curves) -> None:
        panels[label] = lines
        write(arguments.out.with_suffix(".json"), panels, DEVICE)

    print("the step by rows")
    by_rows = curves(arguments.rows, lambda rows: step_cost(rows, 157184, arguments.repeats))
    keep("rows of logits (V = 157184)", by_rows)
    print("the step by vocabulary")
    by_vocabulary = curves(
        arguments.vocabularies, lambda size: step_cost(256, size, arguments.repeats)
    )
    keep("vocabulary (256 rows)", by_vocabulary)
    print("a token by batch")
    by_batch = curves(arguments.batches, lambda batch: per_token(COLUMNS, batch))
    first = arguments.batches[0]
    forward = {batch: forward_cost(model, batch, arguments.repeats) for batch in arguments.batches}
    by_batch["forward alone"] = {
        batch: by_batch["none"][first] * cost / forward[first] for batch, cost in forward.items()
    }
    keep(f"batch (canvas {COLUMNS})", by_batch)
    print("a token by canvas")
    keep("canvas (batch 16)", curves(arguments.lengths, lambda length: per_token(length, 16)))
    draw(panels, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
