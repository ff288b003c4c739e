"""Measure how often a checkpoint's answers are valid, for each task.

    python examples/tiny_dllm/evaluate.py adapters/l2pd_adapters/tiny_models/tiny-llada \\
        --prompts adapters/l2pd_adapters/tiny_models/heldout.jsonl --gen-length 128 256

It decodes as LLaDA does, in the simplest form: blocks from left to right, greedy, the most probable
token first, one token per step. Everything after a committed end-of-text token is cut off. With
`--threshold`, each step commits every token whose probability is at least the threshold, and at
least one token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from l2pd_tools.tiny_world import check
from model import BLOCK_LENGTH, TinyModel, load
from tokenizer import END_OF_TEXT_ID, MASK_ID, decode, prompt_ids


@dataclass(frozen=True)
class Decoded:
    answer: str
    tokens: int  # up to and including the end-of-text token
    forwards: int


@torch.inference_mode()
def decode_prompts(
    model: TinyModel,
    prompts: Sequence[str],
    gen_length: int,
    threshold: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Decoded]:
    """Decode one batch, padded on the right; finished rows leave it."""
    ids = [prompt_ids(prompt) for prompt in prompts]
    device = model.lm_head.weight.device
    first = torch.tensor([len(prompt) for prompt in ids])
    if model.shape.architecture == "sdar":  # blocks are counted from the prompt's first token
        origin = torch.zeros_like(first)
        ends = -(-(first + gen_length) // BLOCK_LENGTH) * BLOCK_LENGTH
    else:
        origin, ends = first, first + gen_length
    tokens = torch.full((len(ids), int(ends.max())), MASK_ID)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    rows, tokens = torch.arange(len(ids), device=device), tokens.to(device)
    first, origin, ends = first.to(device), origin.to(device), ends.to(device)
    in_block = torch.arange(BLOCK_LENGTH, device=device)
    decoded: dict[int, Decoded] = {}
    forwards = 0
    while len(rows):
        # Every row is in the block of its first mask.
        columns = torch.arange(tokens.shape[1], device=device)
        open_ = (tokens == MASK_ID) & (columns < ends[:, None])
        begin = origin + (open_.int().argmax(1) - origin) // BLOCK_LENGTH * BLOCK_LENGTH
        # The columns that any row sees; in a block-causal model they end with the row's block.
        seen = begin + BLOCK_LENGTH if model.shape.architecture == "sdar" else ends
        length = int(seen.max())
        forwards += 1
        hidden = model(tokens[:, :length], columns[:length] < ends[:, None], dtype)

        block = begin[:, None] + in_block
        inside = block < ends[:, None]
        block = block.clamp(max=length - 1)
        masked = open_.gather(1, block) & inside
        state = hidden.gather(1, block[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = model.lm_head(state).float()
        logits[..., MASK_ID] = -torch.inf
        confidence, best = logits.softmax(-1).max(-1)
        confidence = confidence.masked_fill(~masked, -1.0)
        chosen = torch.zeros_like(masked).scatter_(1, confidence.argmax(1, keepdim=True), True)
        if threshold is not None:
            chosen |= confidence >= threshold
        row, column = (chosen & masked).nonzero(as_tuple=True)
        tokens[row, block[row, column]] = best[row, column]

        ended = chosen & masked & (best == END_OF_TEXT_ID)
        end = torch.where(ended, block + 1, ends[:, None]).amin(1)
        if model.shape.architecture == "sdar":  # the rest of the block stays visible
            tokens.masked_fill_(columns >= end[:, None], END_OF_TEXT_ID)
            end = torch.minimum(ends, torch.where(ended.any(1), begin + BLOCK_LENGTH, ends))
        ends = end
        done = ~((tokens == MASK_ID) & (columns < ends[:, None])).any(1)
        for index in done.nonzero().flatten().tolist():
            start = int(first[index])
            canvas = tokens[index, start : min(start + gen_length, int(ends[index]))].tolist()
            size = canvas.index(END_OF_TEXT_ID) + 1 if END_OF_TEXT_ID in canvas else len(canvas)
            decoded[int(rows[index])] = Decoded(decode(canvas), size, forwards)
        rows, tokens = rows[~done], tokens[~done]
        first, origin, ends = first[~done], origin[~done], ends[~done]
    return [decoded[row] for row in range(len(ids))]


def evaluate(
    model: TinyModel,
    rows: Sequence[dict[str, Any]],
    gen_length: int,
    threshold: float | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 40,
) -> list[dict[str, Any]]:
    """The rows, each with its `answer`, `valid`, `tokens` and `forwards`."""
    # Prompts of one task finish at about the same time, so few rows of a batch are idle.
    ordered = sorted(rows, key=lambda row: (row["task"], len(row["prompt"])))
    scored = []
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        prompts = [row["prompt"] for row in batch]
        outputs = decode_prompts(model, prompts, gen_length, threshold, dtype)
        for row, output in zip(batch, outputs, strict=True):
            valid = check(row["task"], row["data"], output.answer)
            scored.append({**row, **vars(output), "valid": valid})
    return scored


def summary(scored: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Validity and tokens per forward of every task, every kind, and overall."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in scored:
        for name in (row["task"], f"[{row['kind']}]", "[all]"):
            groups[name].append(row)
    return {
        name: {
            "n": len(group),
            "valid": sum(row["valid"] for row in group) / len(group),
            "tpf": sum(row["tokens"] for row in group) / sum(row["forwards"] for row in group),
        }
        for name, group in groups.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="heldout.jsonl")
    parser.add_argument("--limit", type=int, help="only so many prompts from the file's start")
    parser.add_argument("--gen-length", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--threshold", type=float, nargs="+", help="sweep; default: one per step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the tables there, too")
    parser.add_argument("--failures", type=int, default=0, help="show so many invalid answers")
    args = parser.parse_args()
    model = load(args.checkpoint).to(args.device)
    rows = [json.loads(line) for line in args.prompts.read_text().splitlines()][: args.limit]
    results = []
    for gen_length in args.gen_length:
        for threshold in args.threshold or [None]:
            began = time.perf_counter()
            scored = evaluate(model, rows, gen_length, threshold)
            table = summary(scored)
            rule = "one token per step" if threshold is None else f"confidence >= {threshold}"
            print(f"\ngen {gen_length}, {rule}, {len(rows)} prompts", end=", ")
            print(f"{time.perf_counter() - began:.0f} s")
            for name, line in table.items():
                print(f"  {name:14} {line['n']:5.0f}  {line['valid']:.4f}  {line['tpf']:6.2f}")
            results.append({"gen_length": gen_length, "threshold": threshold, "table": table})
            wrong = [row for row in scored if not row["valid"]]
            for row in wrong[: args.failures]:
                print(f"    {row['task']}: {row['prompt']!r} -> {row['answer']!r}")
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
